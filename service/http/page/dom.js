// Elements and numbers.

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["line", "path", "rect"]);

/** Make an element: attributes by name, `text` for its text, `css` for custom properties. */
export function make(name, { text, css = {}, ...attributes } = {}, ...children) {
  const element = DRAWN.has(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  for (const [key, value] of Object.entries(css)) element.style.setProperty(`--${key}`, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}

export const byId = id => document.getElementById(id);

/** The part of a piece of the page that is named so. */
export const part = (root, name) => root.querySelector(`[data-part="${name}"]`);

/** Change a text only where it differs: what is said again is read out again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Fill a description list with pairs of a term and what it is. */
export function describe(list, pairs) {
  list.replaceChildren(...pairs.map(([term, value]) =>
    make("div", {}, make("dt", { text: term }), make("dd", { text: value }))));
}

/** A share in percent; between 0 and 1 it is never rounded to none or to all. */
export function percent(share, digits = 1) {
  const shown = (100 * share).toFixed(digits), least = 10 ** -digits;
  if (share < 0) return `${shown} %`.replace("-", Number(shown) ? "−" : "");
  if (share > 0 && Number(shown) === 0) return `< ${least.toFixed(digits)} %`;
  if (share < 1 && Number(shown) === 100) return `> ${(100 - least).toFixed(digits)} %`;
  return `${shown} %`;
}

export function milliseconds(value) {
  if (value >= 1000) return `${(value / 1000).toFixed(2)} s`;
  return `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
}

export function multiplyAdds(count) {
  for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (count >= size) return `${(count / size).toPrecision(3)} ${unit}`;
  }
  return String(count);
}
