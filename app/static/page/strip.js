/* The chain strip: x_t beside x̂_0, and where t lies on the schedule.

Time runs as in the paper's figure: noise at the left, the image at the right. */

import { html, useEffect, useMemo, useState } from "./vendor/preact-htm.js";
import { Picture } from "./parts.js";
import { service } from "./service.js";
import { NOISE, SIGNAL, SNR, X_START, X_T, compact } from "./words.js";

const WIDTH = 600;
const HEIGHT = 96;
const DECADES = 4; // of SNR, either side of 1

/* ᾱ_t of t = 0..T, once the service has told it. */
export function useAlphaBar(model) {
  const [found, setFound] = useState(null);
  useEffect(() => {
    let here = true;
    setFound(null);
    if (model) {
      service.schedule(model).then(
        (schedule) => here && setFound([1, ...schedule.alpha_bar]), () => {});
    }
    return () => { here = false; };
  }, [model]);
  return found;
}

const x = (t, T) => (WIDTH * (T - t)) / T;
const y = (share) => HEIGHT * (1 - share);
const ofSnr = (alphaBar) =>
  0.5 + Math.max(-0.5, Math.min(0.5, Math.log10(alphaBar / (1 - alphaBar)) / (2 * DECADES)));

function lineOf(alphaBar, value) {
  const T = alphaBar.length - 1;
  const step = Math.max(1, Math.floor(T / 150));
  const ts = [];
  for (let t = T; t > 0; t -= step) ts.push(t);
  ts.push(0);
  return `M${ts.map((t) => `${x(t, T).toFixed(1)} ${y(value(alphaBar[t])).toFixed(1)}`).join("L")}`;
}

/* The curves √ᾱ_t and √(1−ᾱ_t) with log SNR behind them, and t on them. */
export function Curve({ alphaBar, t, marks }) {
  const lines = useMemo(() => alphaBar && {
    signal: lineOf(alphaBar, Math.sqrt),
    noise: lineOf(alphaBar, (a) => Math.sqrt(1 - a)),
    snr: lineOf(alphaBar, ofSnr),
  }, [alphaBar]);
  const T = alphaBar ? alphaBar.length - 1 : 1;
  const at = alphaBar?.[Math.round(t)];
  return html`<svg class="curve" viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none"
    aria-hidden="true">
    ${lines && html`<g>
      ${marks?.map((mark) => html`<path class="tick" d="M${x(mark, T)} ${HEIGHT}v-5" />`)}
      <path class="snr" d=${lines.snr} />
      <path class="noise" d=${lines.noise} />
      <path class="signal" d=${lines.signal} />
      <path class="now" d="M${x(t, T)} 0V${HEIGHT}" />
      <path class="snr dot" d="M${x(t, T)} ${y(ofSnr(at))}h.01" />
      <path class="noise dot" d="M${x(t, T)} ${y(Math.sqrt(1 - at))}h.01" />
      <path class="signal dot" d="M${x(t, T)} ${y(Math.sqrt(at))}h.01" />
    </g>`}
  </svg>`;
}

/* A slider over t. stops: the t there are, largest first; null: all of them. */
export function TimeSlider({ T, t, stops, onChange, disabled }) {
  const nearest = (wanted) => (stops
    ? stops.reduce((best, s) => (Math.abs(s - wanted) < Math.abs(best - wanted) ? s : best), stops[0])
    : wanted);
  const keys = (event) => {
    const way = { ArrowLeft: -1, ArrowDown: -1, PageDown: -5, ArrowRight: 1, ArrowUp: 1, PageUp: 5 };
    const by = way[event.key];
    if (by === undefined) return;
    event.preventDefault();
    if (!stops) onChange(Math.max(0, Math.min(T, t - by * (Math.abs(by) > 1 ? T / 50 : 1))));
    else onChange(stops[Math.max(0, Math.min(stops.length - 1, stops.indexOf(nearest(t)) + by))]);
  };
  return html`<input type="range" class="time" min="0" max=${T} step="1" value=${T - t}
    disabled=${disabled} aria-label="Time in the chain, from noise to the image"
    aria-valuetext=${t === 0 ? "t = 0, the image" : `t = ${Math.round(t)} of ${T}`}
    onKeyDown=${keys} onInput=${(event) => onChange(nearest(T - event.target.value))} />`;
}

/* The readings at t: the share of the image, of the noise, and their ratio. */
export function Readings({ alphaBar, t }) {
  const a = alphaBar?.[Math.round(t)];
  const tell = (value) => (a === undefined ? "–" : value);
  const snr = a === 1 ? "∞" : compact(a / (1 - a));
  return html`<dl class="readings">
    <div class="of-t"><dt><i class="math">t</i></dt><dd>${Math.round(t)}</dd></div>
    <div class="of-signal"><dt>${SIGNAL}</dt><dd>${tell(Math.sqrt(a).toFixed(3))}</dd></div>
    <div class="of-noise"><dt>${NOISE}</dt><dd>${tell(Math.sqrt(1 - a).toFixed(3))}</dd></div>
    <div class="of-snr"><dt>${SNR}</dt><dd>${tell(snr)}</dd></div>
  </dl>`;
}

/* x_t and x̂_0 at t, the curve, the slider. tStart: where x̂_0 is still that of another t. actions:
   what can be done from here. */
export function Strip({
  model, T, t, stops, xT, xStart, tStart = t, onChange, disabled, actions, captions,
  signs = [X_T, X_START], name = "The chain",
}) {
  const alphaBar = useAlphaBar(model);
  return html`<section class="strip" aria-label=${name}>
    <figure><${Picture} picture=${xT} alt=${`x_t at t = ${Math.round(t)}`} />
      <figcaption>${signs[0]} <span>${captions?.[0] ?? "what the chain holds"}</span></figcaption></figure>
    <figure><${Picture} picture=${xStart} alt=${`x̂_0 at t = ${Math.round(tStart)}`} />
      <figcaption>${signs[1]} <span>${tStart === t ? captions?.[1] ?? "what the network expects"
        : `still that of t\u00a0=\u00a0${tStart}`}</span></figcaption>
    </figure>
    <div class="where">
      <${Readings} alphaBar=${alphaBar} t=${t} />
      <${Curve} alphaBar=${alphaBar} t=${t} marks=${stops} />
      <${TimeSlider} T=${T} t=${t} stops=${stops} onChange=${onChange} disabled=${disabled} />
      <div class="ends" aria-hidden="true"><span>noise, t = ${T}</span><span>image, t = 0</span></div>
    </div>
    ${actions && html`<div class="actions">${actions}</div>`}
  </section>`;
}
