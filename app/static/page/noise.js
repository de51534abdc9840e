/* Noise: a picture at any t, what the network expects of it there, and back again many ways. */

import { html, useEffect, useMemo, useState } from "./vendor/preact-htm.js";
import { CodeDialog, Menu, filesOf } from "./files.js";
import { useAsk, usePictures, useResult } from "./desk.js";
import { Source } from "./pad.js";
import { Cancel, Chips, NoModels, Progress } from "./parts.js";
import { epsOf, guess, noised, shown } from "./pictures.js";
import { chain, filling, many, onward, shortSeed, stepsFrom } from "./requests.js";
import { service } from "./service.js";
import { ClassChips, ModelChoice, Settings, startOf } from "./settings.js";
import { Stage } from "./stage.js";
import { Strip, useAlphaBar } from "./strip.js";
import { Summary, Unknown } from "./unknown.js";
import { X_START, X_T } from "./words.js";

const VARIATIONS = 9;
const LAMBDAS = Array.from({ length: 9 }, (_, i) => i / 8);
const SETTLED_MS = 250;
const NONE = { of: null, t: null, picture: null, error: null };
const MODES = [["denoise", "Denoise"], ["mix", "Mix two"], ["restore", "Restore"]];
const MODE_OF = { interpolate: "mix", restore: "restore" };

/* ε of this picture's size and seed; null until the service has drawn it. */
function useEps(model, picture, seed, say) {
  const [found, setFound] = useState(null);
  useEffect(() => {
    setFound(null);
    if (!picture) return undefined;
    const gone = new AbortController();
    const unlessGone = (does) => (what) => gone.signal.aborted || does(what);
    epsOf(model, picture, seed, gone.signal).then(unlessGone(setFound), unlessGone(say));
    return () => gone.abort();
  }, [model?.name, picture && picture.shape.join(), !picture, seed]);
  return found;
}

/* x̂_0 at t, asked for when the slider rests: {t, picture, error}. That of the t before stays in view
   until then; of another picture, model, seed or class there is nothing to see. */
function useGuess(model, picture, { t, seed, label }) {
  const [found, setFound] = useState(NONE);
  const known = useMemo(() => new Map(), [picture, model.digest, seed, label]); // t → {url}
  useEffect(() => {
    if (!picture || t < 1) return undefined;
    const tell = (what) => setFound({ ...NONE, of: known, t, ...what });
    if (known.has(t)) {
      tell({ picture: known.get(t) });
      return undefined;
    }
    const gone = new AbortController();
    const ask = async () => {
      try {
        known.set(t, await guess(model, picture, { t, seed, label }, gone.signal));
        if (!gone.signal.aborted) tell({ picture: known.get(t) });
      } catch (error) {
        if (!gone.signal.aborted) tell({ error });
      }
    };
    const timer = setTimeout(ask, SETTLED_MS);
    return () => { gone.abort(); clearTimeout(timer); };
  }, [known, t]);
  return found.of === known ? found : NONE;
}

export function Noise({ run }) {
  const [fault, say] = useState(null);
  const [asking, ask] = useAsk(say);
  const desk = usePictures(run, say);
  const { model, slots } = desk;
  const [chosen, setMode] = useState(null);
  const mode = chosen ?? MODE_OF[run?.job?.kind] ?? "denoise";
  const [t, setT] = useState(null);
  const [first] = useState(shortSeed);
  const [drawn, draw] = useState(null);
  const [code, setCode] = useState(false);
  const result = useResult(run);
  if (!model) return html`<${NoModels} service=${service} />`;
  const { settings: now } = desk;
  const put = (slot) => (picture) => { say(null); desk.put(slot, picture); };
  const bring = (slot) => (coming) => { say(null); desk.bring(slot, coming).catch(say); };
  const change = (some) => desk.change(some);
  // Of a job that is shown, its own, until others are chosen.
  const its = run?.job?.request;
  const at = Math.min(t ?? (its && startOf(its)) ?? Math.round(0.35 * model.T), model.T);
  const written = /^[0-9]+$/.test(now.seed) ? Number(now.seed) : null;
  const seed = written ?? drawn ?? its?.seed ?? first;
  const live = run?.live;

  const how = (mode === "mix" ? onward : many)(model, now);
  const walk = (images) => ({
    ...chain(model, how, images, stepsFrom(at, model.T, how.steps)), t: at, seed });
  const denoise = () => ask("reconstruct",
    { ...walk(VARIATIONS), num_images: VARIATIONS, images: [slots.a.png] },
    { title: `${VARIATIONS} from t = ${at}`, picture: slots.a.src });
  const mix = () => ask("interpolate",
    { ...walk(LAMBDAS.length), lambdas: LAMBDAS, images: [slots.a.png, slots.b.png] },
    { title: `a mixture at t = ${at}`, picture: slots.a.src });
  const restore = () => ask("restore",
    filling(model, now, { images: [slots.a.png], mask: slots.mask.png, count: VARIATIONS, seed }),
    { title: `${VARIATIONS} fillings`, picture: slots.a.src });
  const act = { denoise, mix, restore }[mode];
  const words = { denoise: `Denoise from here ×${VARIATIONS}`, mix: "Mix here, nine shares",
    restore: `Fill in, ${VARIATIONS} ways` }[mode];
  const ready = slots.a && !live && !asking
    && (mode === "restore" ? slots.mask : at > 0 && (mode !== "mix" || slots.b));

  const actions = html`
    <button class="go" id="denoise" form="noise" disabled=${!ready}>${words}</button>
    <button type="button" id="reseed"
      onClick=${() => { draw(shortSeed()); change({ seed: "" }); }}>Other noise</button>
    ${live && html`<${Cancel} run=${run} onError=${say} />`}`;

  return html`<form class="panel" id="noise" aria-label="A picture to noise"
      onSubmit=${(event) => { event.preventDefault(); if (ready) act(); }}>
      <${ModelChoice} model=${model} onChange=${(name) => desk.choose(name)}
        thumbnail=${slots.a} />
      <${Chips} name="mode" label="What to do" value=${mode} options=${MODES} onChange=${setMode} />
      <${Source} model=${model} picture=${slots.a} onPicture=${put("a")}
        onComing=${bring("a")} label=${mode === "mix" ? "The first picture" : "Your picture"} />
      ${mode === "mix" && html`<${Source} model=${model} picture=${slots.b}
        onPicture=${put("b")} onComing=${bring("b")} label="The second picture" />`}
      ${mode === "restore"
        ? html`<${ClassChips} model=${model} value=${now.label}
            onChange=${(label) => change({ label })} />`
        : html`<${Settings} model=${model} settings=${now}
            onChange=${change} />`}
    </form>
    <div class="work">
      ${fault && html`<p class="fault" role="alert">${fault.message}</p>`}
      ${mode === "restore"
        ? html`<${Unknown} shape=${model.shape} picture=${slots.a} mask=${slots.mask}
            onMask=${(mask) => desk.put("mask", mask)}
            actions=${actions} />`
        : html`<${Forward} model=${model} slots=${slots} mode=${mode} t=${at} seed=${seed}
            label=${now.label} by=${how.sampler} chosen=${now.sampler} say=${say} actions=${actions}
            onChange=${(to) => setT(Math.round(to))} />`}
      ${run && html`<div ref=${result}>
        <${Stage} run=${run} wide=${run.job?.kind === "interpolate"}
          head=${html`<${Progress} run=${run} service=${service} />`}
          below=${html`<${Summary} run=${run} />`}
          actions=${(time, index, view) => html`
            <${Menu} words="Download" items=${filesOf(run, index, view.kind)} onError=${say} />
            <button type="button" id="code" disabled=${!run.job}
              onClick=${() => setCode(true)}>As code</button>
            ${run.images[index] && html`<a class="button"
              href=${`#noise&picture=${run.id}/${index}`}>Take this one</a>`}`} /></div>`}
      <${CodeDialog} open=${code} run=${run} onClose=${() => setCode(false)} />
    </div>`;
}

/* The forward process of the picture at hand: x_t here, for every t, of the very ε that the service
   will start from; x̂_0 by one evaluation of the network. */
function Forward({ model, slots, mode, t, seed, label, by, chosen, onChange, say, actions }) {
  const { a, b } = slots;
  const eps = useEps(model, a, seed, say);
  const alphaBar = useAlphaBar(model.name);
  const look = useGuess(model, mode === "mix" ? null : a, { t, seed, label });
  const x0 = a && mode === "mix" && b ? a.x.map((value, i) => (value + b.x[i]) / 2) : a?.x;
  const xT = a && (t === 0 ? shown(x0, model.shape)
    : eps && alphaBar ? shown(noised(x0, eps, alphaBar[t]), model.shape) : null);
  const why = mode === "mix" ? "is for whole chains"
    : "draws no noise, and its ways would all be one";
  const xStart = mode === "mix" ? null : t === 0 ? a : look.picture;
  return html`<div class="forward">
    <p class="lead">${!a
      ? html`Draw something, or take a picture, and slide it into noise.`
      : mode === "mix"
        ? html`Both pictures get the same noise; at <i class="math">t</i> they are mixed: λ of the second, 1−λ of the first.`
        : html`${X_T} is your picture with noise, as ${model.name} sees it at <i class="math">t</i>.`}
      ${a && by !== chosen && ` Back goes ${by}: ${chosen} ${why}.`}</p>
    <${Strip} name="Your picture in noise" model=${model.name} T=${model.T} t=${t} stops=${null} xT=${xT}
      xStart=${xStart} tStart=${xStart && xStart === look.picture ? look.t : t} disabled=${!a}
      onChange=${onChange} actions=${actions}
      captions=${mode === "mix" ? ["both, half and half", "decoded below"] : null} />
    ${t > 0 && look.error && html`<p class="fault" role="alert">${X_START} at <i class="math">t</i> = ${
      look.t}: ${look.error.message}</p>`}</div>`;
}
