"""Gradient checkpointing under the name that the installed transformers has for it."""


def enable_checkpointing(model, *arguments):
    """Turn it on; arguments as of activation_checkpointing_enable."""
    new_name = getattr(model, "activation_checkpointing_enable", None)
    (new_name or model.gradient_checkpointing_enable)(*arguments)
