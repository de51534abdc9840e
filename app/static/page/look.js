/* Look inside: what a picture costs in bits, term by term, and what those bits show. */

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { Plot } from "./charts.js";
import { useAsk, useOwn, usePictures, useResult } from "./desk.js";
import { CodeDialog } from "./files.js";
import { Source } from "./pad.js";
import { Cancel, NoModels, Picture, Progress, download } from "./parts.js";
import { guess } from "./pictures.js";
import { shortSeed } from "./requests.js";
import { service } from "./service.js";
import { ClassChips, ModelChoice } from "./settings.js";
import { Strip } from "./strip.js";
import { X_0, X_START, X_T, bound, compact, count } from "./words.js";

const SHARES = [0.01, 0.05, 0.12, 0.25, 0.5, 1];
const FILM_FRAMES = 40;

export function Look({ run }) {
  const [fault, say] = useState(null);
  const [asking, ask] = useAsk(say);
  const shown = useResult(run);
  const [code, setCode] = useState(false);
  const desk = usePictures(run, say);
  const { model, slots: { a } } = desk;
  const its = service.model(run?.job?.model);
  const own = useOwn(run, its, say);
  if (!model) return html`<${NoModels} service=${service} />`;
  const { label } = desk.settings;
  const put = (picture) => { say(null); desk.put("a", picture); };
  const bring = (coming) => { say(null); desk.bring("a", coming).catch(say); };
  const live = run?.live;
  const ready = a && !live && !asking;
  const of = (request) => ({ model: model.name, images: [a.png], ...request });
  const measure = () => ask("likelihood", of({
    mode: "full",
    seed: shortSeed(),
    terms: Array.from({ length: model.T }, (_, i) => i + 1),
    ...(label === null ? {} : { class_label: label }),
  }), { title: "bits of a picture", picture: a.src });
  const film = () => ask("noise", of({
    mode: "stepwise",
    seed: shortSeed(),
    t: [...new Set(Array.from({ length: FILM_FRAMES }, (_, i) =>
      Math.max(1, Math.round((model.T * (i + 1)) / FILM_FRAMES))))],
  }), { title: "the way into noise", picture: a.src });
  const result = run?.job?.result;
  return html`<form class="panel" aria-label="A picture to look into"
      onSubmit=${(event) => { event.preventDefault(); if (ready) measure(); }}>
      <${ModelChoice} model=${model} onChange=${(name) => desk.choose(name)}
        thumbnail=${a} />
      <${Source} model=${model} picture=${a} onPicture=${put} onComing=${bring} />
      <${ClassChips} model=${model} value=${label}
        onChange=${(label) => desk.change({ label })} label="What the model is told it is" />
      <div class="submit">
        <button class="go" id="measure" disabled=${!ready}>Measure bits</button>
        <button type="button" id="film" disabled=${!ready} onClick=${film}>Forward film</button>
        ${live && html`<${Cancel} run=${run} onError=${say} />`}
      </div>
    </form>
    <div class="work" ref=${shown}>
      ${fault && html`<p class="fault" role="alert">${fault.message}</p>`}
      ${run ? html`<${Progress} run=${run} service=${service} />` : html`<p class="lead">
        How many bits does the model need to send your picture? The bound falls apart into one term
        a step of the chain; most of it describes what nobody sees. All ${model.T} terms take one
        evaluation of the network each.</p>`}
      ${run?.job?.kind === "noise" && html`<${Film} key=${run.id} run=${run} T=${its?.T ?? 1000}
        picture=${own} say=${say} />`}
      ${result && its && html`<${Bits} key=${run.id} run=${run} result=${result} model=${its} picture=${own} />`}
      ${run && html`<p class="row"><button type="button" id="code" disabled=${!run.job}
        onClick=${() => setCode(true)}>As code</button></p>
        <${CodeDialog} open=${code} run=${run} onClose=${() => setCode(false)} />`}
    </div>`;
}

/* The forward chain as a film: x_t as it was kept, noise at the left as everywhere. */
function Film({ run, T, picture, say }) {
  const [t, setT] = useState(null);
  const [playing, setPlaying] = useState(false);
  const rising = [...run.times].reverse();
  useEffect(() => {
    if (!playing) return undefined;
    let at = 0;
    const timer = setInterval(() => {
      if (at < rising.length) setT(rising[at++]);
      else setPlaying(false);
    }, 90);
    return () => clearInterval(timer);
  }, [playing]);
  const at = t ?? rising[0] ?? T;
  return html`<${Strip} model=${run.job.model} T=${T} t=${at} stops=${run.times.length ? run.times : [T]}
      xT=${run.picture(at, "x_t", 0)} xStart=${picture}
      signs=${[X_T, X_0]} captions=${["the chain, step by step", "the picture"]}
      onChange=${(to) => { setPlaying(false); setT(to); }} actions=${html`
        <button type="button" id="play" onClick=${() => setPlaying(!playing)}>${playing ? "Stop" : "Play"}</button>
        <button type="button" disabled=${!run.ended} onClick=${() => download(
          `jobs/${run.id}/snapshots.gif?px=384`, `${run.id}.gif`).catch(say)}>Download the film</button>`} />
    <div class="filmstrip" aria-hidden="true">${run.times.filter((_, i) => i % 4 === 0).map((time) =>
      html`<${Picture} key=${time} picture=${run.picture(time, "x_t", 0)} alt="" />`)}</div>`;
}

/* As in the paper's section 4.3, t falling: what it takes to know x_t, which is the sum of the
   terms of the steps before, and how far x̂_0 is off there. */
export function ratesOf({ t, bits_per_dim: bits, rmse }) {
  const order = t.map((_, i) => i).sort((i, j) => t[j] - t[i]);
  let sum = 0;
  return order.map((i) => {
    const rate = sum;
    sum += bits[i];
    return { t: t[i], rate, rmse: rmse[i], bits: bits[i] };
  });
}

/* Neighbouring steps as one point: each term alone is one draw of noise. Fine where t is small. */
function means(steps) {
  const bins = new Map();
  for (const step of steps) {
    const bin = step.t < 12 ? step.t : 100 + Math.floor(10 * Math.log(step.t));
    bins.set(bin, [...(bins.get(bin) ?? []), step]);
  }
  const mean = (all, name) => all.reduce((sum, one) => sum + one[name], 0) / all.length;
  return [...bins.values()].map((all) => Object.fromEntries(
    ["t", "rate", "rmse", "bits"].map((name) => [name, mean(all, name)])));
}

function Bits({ run, result, model, picture }) {
  const [image] = result.images;
  const told = image.terms?.t.length ?? 0;
  const steps = told === model.T ? ratesOf(image.terms) : []; // a rate is a sum over all of them
  const parts = image.L_0 == null ? [] : [  // a density by the flow has none
    [bound("0"), image.L_0, "noise", "the last step, to 8 bits"],
    [html`${bound("1")} … ${bound("T−1")}`, image.L_t, "signal", "the chain"],
    [bound("T"), image.L_T, "dim", "the noise it starts from"]];
  return html`<section class="bits" aria-label="What the picture costs">
    <div class="figures">
      <div class="figure"><b>${image.bits_per_dim.toFixed(3)}</b><small>bits/dim, all in all${
        result.images.length > 1 && `; the first of ${count(result.images.length, "picture")}`}</small></div>
      <div class="figure"><b>${Math.round((image.bits_per_dim * result.dims) / 8).toLocaleString("en")}</b>
        <small>bytes for ${result.dims.toLocaleString("en")} numbers</small></div>
      ${parts.map(([sign, value, colour, words]) => html`<div class=${`figure ${colour}`} key=${words}>
        <b>${compact(value)}</b><small>${sign} ${words}</small></div>`)}
    </div>
    ${parts.length > 0 && html`<div class="stack" role="img" aria-label=${`Of it L_0 ${
      compact(image.L_0)}, the terms between ${
      compact(image.L_t)}, L_T ${compact(image.L_T)} bits/dim`}>
      ${parts.map(([, value, colour]) => html`<i key=${colour} class=${colour}
        style=${{ flexGrow: value / image.bits_per_dim }}></i>`)}</div>`}
    ${told > 0 && told < model.T && html`<p class="hint">${count(told, "term")} of ${
      model.T.toLocaleString("en")} were asked for: what comes after so many bits takes all of them.</p>`}
    ${steps.length > 2 && html`
      <div class="columns">
        <${Plot} title=${html`The term of each step, bits/dim`} colour="signal"
          points=${means(steps).map((s) => [s.t, Math.max(s.bits, 1e-9)])}
          x=${{ words: "t", range: [1, model.T], log: true }}
          y=${{ words: "bits/dim", log: true, range: [
            Math.max(1e-9, Math.min(...steps.map((s) => s.bits).filter((b) => b > 0))),
            Math.max(...steps.map((s) => s.bits))] }} />
        <${Plot} title=${html`Rate and distortion: error of ${X_START}, of 255, after so many bits/dim`}
          colour="noise" points=${means(steps).map((s) => [s.rate, s.rmse])}
          x=${{ words: "rate, bits/dim", range: [0, steps.at(-1).rate] }}
          y=${{ words: "RMSE", range: [0, Math.max(...steps.map((s) => s.rmse))] }} />
      </div>
      <${Shares} run=${run} model=${model} picture=${picture} steps=${steps} />`}
  </section>`;
}

/* What can be shown once a share of the bits has come. */
function Shares({ run, model, picture, steps }) {
  const total = steps.at(-1).rate;
  const points = SHARES.map((share) => ({
    share, at: steps.find(({ rate }) => rate >= share * total * 0.999) ?? steps.at(-1) }));
  const [found, setFound] = useState([]);
  const [fault, say] = useState(null);
  useEffect(() => {
    if (!picture) return undefined;
    const gone = new AbortController();
    const { seed, class_label: label = null } = run.job.request;
    const ask = async () => {
      for (const [i, { at }] of points.entries()) {
        try {
          const answer = await guess(model, picture, { t: at.t, seed, label }, gone.signal);
          setFound((old) => Object.assign([...old], { [i]: answer }));
        } catch (error) {
          if (gone.signal.aborted) return;
          say(error);
        }
      }
    };
    ask();
    return () => gone.abort();
  }, [run.id, picture]);
  return html`<h2>What each share of the bits shows</h2>
    ${!picture && html`<p class="hint">The picture itself is not kept with its numbers: bring it
      again, and measure it, to see this.</p>`}
    ${fault && html`<p class="fault" role="alert">${fault.message}</p>`}
    <ul class="shares">${points.map(({ share, at }, i) => html`<li key=${share}>
      <${Picture} picture=${found[i]} alt=${`x̂_0 after ${Math.round(share * 100)} % of the bits`} />
      <b>${Math.round(share * 100)} %</b><small>t = ${at.t} · RMSE ${at.rmse.toFixed(1)}</small></li>`)}</ul>`;
}
