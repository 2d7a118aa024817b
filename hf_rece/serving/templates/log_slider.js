const [number, range] = element.querySelectorAll("input");
const show = () => {
  const filled = (range.value - range.min) / (range.max - range.min);
  range.style.setProperty("--filled", `${100 * filled}%`);
  range.setAttribute("aria-valuetext", number.value);
};
const send = () => {
  show();
  props.value = number.valueAsNumber; // NaN, which comes as None, for what is no number
  trigger("input");
};
range.addEventListener("input", () => {
  number.value = Number((10 ** range.value).toPrecision(2));
  send();
});
number.addEventListener("input", () => {
  range.value = Math.log10(number.value);
  send();
});
show();
