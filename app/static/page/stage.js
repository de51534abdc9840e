/* A run on the stage: its pictures live, and the chain of the one that is chosen. */

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { useObservable } from "./observable.js";
import { Picture } from "./parts.js";
import { service } from "./service.js";
import { Strip } from "./strip.js";
import { X_START, X_T } from "./words.js";

const FRAME_MS = 90;

/* What is looked at: t (null: what is newest), which image, and x_t or x̂_0 in the grid. */
export function useView(run) {
  const [view, setView] = useState({ t: null, index: 0, kind: "x_start", playing: false });
  const set = (change) => setView((old) => ({ ...old, ...change }));
  useEffect(() => set({ t: null, index: 0, playing: false }), [run]);
  useEffect(() => {
    if (!view.playing) return undefined;
    const stops = [...run.times, ...(run.images.length ? [0] : [])];
    let at = 0;
    const timer = setInterval(() => {
      if (at < stops.length) set({ t: stops[at++] });
      else set({ playing: false });
    }, FRAME_MS);
    return () => clearInterval(timer);
  }, [view.playing, run]);
  return [view, set];
}

const columns = (n, wide) => (wide ? n : Math.ceil(Math.sqrt(n)));

/* The pictures of a run at t. */
export function Grid({ run, view, onChoose, wide }) {
  const cells = Array.from({ length: run.count }, (_, i) => {
    const { [view.kind]: wanted, x_start, x_t } = run.latest[i] ?? {};
    const live = wanted ?? x_start ?? x_t; // not every job keeps both
    const picture = view.t === null
      ? run.images[i] ?? live
      : run.picture(view.t, view.kind, i) ?? (view.t === 0 ? live : undefined);
    return html`<button type="button" key=${i} aria-pressed=${i === view.index}
      aria-label=${`Image ${i + 1}${i === view.index ? ", its chain is below" : ""}`}
      onClick=${() => onChoose(i)}><${Picture} picture=${picture} alt="" /></button>`;
  });
  const across = columns(run.count, wide);
  return html`<div class=${`grid ${wide ? "wide" : ""}`} id="grid"
    style=${{ "--columns": across }}>${cells}</div>`;
}

/* Which of the two kinds the grid shows, once there is a choice. */
function KindChoice({ view, set }) {
  return html`<fieldset class="chips kind"><legend class="hidden">Show</legend>
    ${[["x_t", X_T], ["x_start", X_START]].map(([kind, sign]) => html`<label key=${kind}>
      <input type="radio" name="kind" value=${kind} checked=${view.kind === kind}
        onChange=${() => set({ kind })} /><span>${sign}</span></label>`)}
  </fieldset>`;
}

/* actions: (t, index) → what can be done with that state of that image. */
export function Stage({ run, actions, wide, head, below }) {
  useObservable(run);
  useObservable(service);
  const [view, set] = useView(run);
  const T = service.model(run.job?.model)?.T ?? 1000;
  const start = run.times[0] ?? T;
  const newest = run.images[view.index] ? 0 : run.latest[view.index]?.t ?? start;
  const t = view.t ?? newest;
  const stops = [...run.times, ...(run.images.length ? [0] : [])];
  const at = (kind) => run.picture(t, kind, view.index);
  return html`<div class="stage">
    ${head}
    <${Grid} run=${run} view=${view} wide=${wide} onChoose=${(index) => set({ index })} />
    <${Strip} model=${run.job?.model} T=${T} t=${t} stops=${stops.length ? stops : [T]}
      xT=${at("x_t")} xStart=${t === 0 ? run.images[view.index] : at("x_start")}
      disabled=${stops.length < 2}
      onChange=${(to) => set({ t: to, playing: false })}
      actions=${html`
        <button type="button" id="play" disabled=${stops.length < 2}
          onClick=${() => set({ playing: !view.playing })}>${view.playing ? "Stop" : "Play"}</button>
        <${KindChoice} view=${view} set=${set} />
        ${actions?.(t, view.index, view)}`} />
    ${below}
  </div>`;
}
