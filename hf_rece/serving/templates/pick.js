element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-place]");
  if (button) trigger("pick", { ...button.dataset });
});
