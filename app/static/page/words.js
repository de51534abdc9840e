/* The paper's symbols, and numbers as people read them. */

import { html } from "./vendor/preact-htm.js";

export const X_T = html`<i class="math">x<sub>t</sub></i>`;
export const X_0 = html`<i class="math">x<sub>0</sub></i>`;
export const X_START = html`<i class="math">x̂<sub>0</sub></i>`;
export const SIGNAL = html`<span class="math">√<span class="root"><i>ᾱ<sub>t</sub></i></span></span>`;
export const NOISE =
  html`<span class="math">√<span class="root">1−<i>ᾱ<sub>t</sub></i></span></span>`;
export const bound = (index) => html`<i class="math">L<sub>${index}</sub></i>`;
export const SNR = html`<span class="math">SNR</span>`;

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

export function seconds(s) {
  if (s < 0.95) return "under a second";
  if (s < 90) return count(Math.round(s), "second");
  return s < 5400 ? count(Math.round(s / 60), "minute") : count(Math.round(s / 3600), "hour");
}

/* 10⁻⁴ of −4 */
export const raised = (power) =>
  `10${String(power).replace(/./g, (c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] ?? "⁻")}`;

/* 0.00012 → 1.2·10⁻⁴ */
export function compact(x) {
  if (x === 0 || (Math.abs(x) >= 0.01 && Math.abs(x) < 10_000)) {
    return Math.abs(x) >= 100 ? x.toFixed(0) : x.toPrecision(3);
  }
  const [mantissa, power] = x.toExponential(1).split("e"); // after rounding: 99 960 is 1.0·10⁵
  return `${mantissa}·${raised(Number(power))}`;
}

export const ago = (time) => {
  const s = (Date.now() - new Date(time)) / 1000;
  return s < 45 ? "just now" : `${seconds(s)} ago`;
};

/* What a job draws: "nine 7s", or "9 images". */
export function subject(request, model) {
  const n = request.num_images ?? request.lambdas?.length ?? 1;
  const name = model?.class_names[request.class_label];
  return name === undefined ? count(n, "image") : `${n} × ${name}`;
}
