/* Plots in SVG: few points, drawn once, readable by a screen reader through their table. */

import { html } from "./vendor/preact-htm.js";
import { compact, raised } from "./words.js";

const W = 420;
const H = 200;
const EDGE = { left: 46, right: 10, top: 10, bottom: 34 };

const log = (value) => Math.log10(Math.max(value, 1e-12));

function scale([from, to], [low, high], logarithmic) {
  const [a, b] = logarithmic ? [log(from), log(to)] : [from, to];
  return (value) => low + ((high - low) * ((logarithmic ? log(value) : value) - a)) / (b - a || 1);
}

function ticks([from, to], logarithmic) {
  if (!logarithmic) {
    const step = 10 ** Math.floor(Math.log10((to - from) / 2 || 1));
    const wide = (to - from) / step > 5 ? 2 * step : step;
    return Array.from({ length: Math.floor((to - from) / wide) + 1 }, (_, i) => from + i * wide);
  }
  const first = Math.ceil(log(from));
  const all = Array.from({ length: Math.max(1, Math.floor(log(to)) - first + 1) },
    (_, i) => 10 ** (first + i));
  return all.filter((_, i) => i % Math.ceil(all.length / 5) === 0);
}

const tell = (value) => {
  const power = Math.round(log(value));
  const round = value > 0 && Math.abs(value / 10 ** power - 1) < 1e-6;
  return round && (power < -2 || power > 4) ? raised(power) : String(Number(value.toPrecision(3)));
};

/* points: [x, y]. x, y: {words, range, log}. mark: a point to show. */
export function Plot({ title, points, x, y, colour, mark }) {
  const across = scale(x.range, [EDGE.left, W - EDGE.right], x.log);
  const up = scale(y.range, [H - EDGE.bottom, EDGE.top], y.log);
  const line = points.map(([a, b]) => `${across(a).toFixed(1)} ${up(b).toFixed(1)}`).join("L");
  return html`<figure class="plot">
    <figcaption>${title}</figcaption>
    <svg viewBox="0 0 ${W} ${H}" role="img"
      aria-label=${`${x.words} from ${compact(x.range[0])} to ${compact(x.range[1])}; ${y.words} from ${
        compact(points[0][1])} to ${compact(points.at(-1)[1])}`}>
      ${ticks(y.range, y.log).map((value) => html`<g><path class="rule"
        d="M${EDGE.left} ${up(value)}H${W - EDGE.right}" /><text x=${EDGE.left - 6} y=${up(value) + 4}
        text-anchor="end">${tell(value)}</text></g>`)}
      ${ticks(x.range, x.log).map((value) => html`<text x=${across(value)} y=${H - EDGE.bottom + 16}
        text-anchor="middle">${tell(value)}</text>`)}
      <text class="axis" x=${(W + EDGE.left) / 2} y=${H - 3} text-anchor="middle">${x.words}</text>
      <path class=${`line ${colour}`} d="M${line}" />
      ${mark && html`<circle class=${colour} cx=${across(mark[0])} cy=${up(mark[1])} r="5" />`}
    </svg></figure>`;
}
