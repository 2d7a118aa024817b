"""What ZeRO-3 of DeepSpeed does to a model, in one process and without DeepSpeed.

Weights are there while their own module is called, forward and backward; at any other time they
are empty, so that whatever reads them there fails or computes nothing.
"""

import torch

# As DeepSpeed names them.
AVAILABLE, NOT_AVAILABLE = "AVAILABLE", "NOT_AVAILABLE"


class Zero3:
    """Take the weights of `model` away, but for the calls of their modules; works in place.

    Attributes:
        gradients: by name, whole, of the last backward pass.
    """

    def __init__(self, model):
        self.gradients, self._users = {}, {}
        for name, parameter in model.named_parameters():
            parameter.ds_full = parameter.data
            self._users[parameter] = 0
            self._release([parameter], users=0)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._noting(name))
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own:
                self._hook(module, own)

    def _hook(self, module, own):
        gather, release = (lambda: self._gather(own)), (lambda: self._release(own))

        class BeforeBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, output):
                return output.detach()

            @staticmethod
            def backward(ctx, gradient):
                gather()
                return gradient

        class AfterBackward(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                return value.detach()

            @staticmethod
            def backward(ctx, gradient):
                release()
                return gradient

        def before(_, inputs):
            gather()
            return tuple(_mapped(AfterBackward, value) for value in inputs)

        def after(_, inputs, output):
            release()
            return _mapped(BeforeBackward, output)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _gather(self, parameters):
        for parameter in parameters:
            self._users[parameter] += 1
            parameter.data, parameter.ds_status = parameter.ds_full, AVAILABLE

    def _release(self, parameters, users=1):
        for parameter in parameters:
            self._users[parameter] = max(self._users[parameter] - users, 0)
            if not self._users[parameter]:
                parameter.data, parameter.ds_status = torch.empty(0), NOT_AVAILABLE

    def _noting(self, name):
        def note(parameter):
            self.gradients[name] = parameter.grad
            parameter.grad = None

        return note


def _mapped(function, value):
    """Return `value` with `function` applied to the differentiable tensors in it."""
    if isinstance(value, torch.Tensor):
        return function.apply(value) if value.requires_grad else value
    if isinstance(value, tuple):
        return tuple(_mapped(function, part) for part in value)
    return value
