/* Generate: pictures from noise, their chains, and branches of those. */

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { Branches } from "./branches.js";
import { CodeDialog, Menu, filesOf, manifestIn } from "./files.js";
import { useObservable } from "./observable.js";
import { NoModels, Progress } from "./parts.js";
import { useRecorded } from "./recorded.js";
import { again, chain, generation, many, shortSeed, stepsFrom } from "./requests.js";
import { start } from "./runs.js";
import { service } from "./service.js";
import { ImageCount, ModelChoice, Settings, defaults, settingsOf } from "./settings.js";
import { Stage } from "./stage.js";
import { subject } from "./words.js";

const BRANCHES = 4;

/* The form's state: the model by name, and settings that follow it. */
function useSettings(run) {
  const [name, setName] = useState(null);
  const [settings, setSettings] = useState(null);
  const model = service.model(name) ?? service.models[0];
  useEffect(() => { // a job that is opened by its link lends its settings
    if (!run?.job || run.taken) return;
    run.taken = true;
    setName(run.job.model);
    setSettings({ ...settingsOf(run.job.request), seed: "" });
  }, [run, run?.job]);
  const choose = (other) => { setName(other); setSettings(null); };
  const change = (some) => setSettings((old) => ({ ...(old ?? defaults(model)), ...some }));
  return { model, settings: settings ?? (model && defaults(model)), choose, change };
}

export function Generate({ run }) {
  useObservable(service);
  useObservable(run);
  const { model, settings, choose, change } = useSettings(run);
  const [asking, setAsking] = useState(false);
  const [fault, setFault] = useState(null);
  const [code, setCode] = useState(false);
  if (!model) return html`<${NoModels} service=${service} />`;

  /* Ask for a job and show it; what is refused is said below the button. */
  const ask = async (kind, request, about) => {
    setAsking(true);
    setFault(null);
    try {
      await start(kind, request, about);
    } catch (error) {
      setFault(error);
    } finally {
      setAsking(false);
    }
  };
  const generate = (event) => {
    event.preventDefault();
    const request = generation(model, settings);
    ask("generate", request, { title: subject(request, model) });
  };
  const branch = (t, index) => {
    const walk = many(model, settings);
    const request = {
      ...chain(model, walk, BRANCHES, stepsFrom(t, model.T, walk.steps)),
      num_images: BRANCHES,
      seed: shortSeed(),
      source: { job: run.id, t, index },
    };
    ask("reconstruct", request, { title: subject(request, model), parent: request.source });
  };
  const open = async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try {
      const { kind, request } = again(await manifestIn(file));
      await ask(kind, request, { title: subject(request, model) });
    } catch (error) {
      setFault(error);
    }
  };
  const live = run && !run.ended && !run.error;

  return html`<form class="panel" onSubmit=${generate} aria-label="What to generate">
      <${ModelChoice} model=${model} onChange=${choose}
        thumbnail=${run?.images[0]} />
      <${Settings} model=${model} settings=${settings} onChange=${change}>
        <${ImageCount} settings=${settings} onChange=${change} />
      <//>
      <div class="submit">
        <button class="go" id="go" disabled=${asking || live}>Generate</button>
        <button type="button" id="cancel" disabled=${!live || run.job?.cancel_requested}
          onClick=${() => run.cancel().catch(setFault)}>Cancel</button>
      </div>
      <label class="file">Open a manifest, or a PNG that carries one
        <input type="file" accept=".json,.png,application/json,image/png" onChange=${open} /></label>
    </form>
    <div class="work">
      ${fault && html`<p class="fault" role="alert">${fault.message}</p>`}
      ${run ? html`
        <${Stage} run=${run} head=${html`<${Progress} run=${run} service=${service} />`}
          below=${html`<${Branches} id=${run.id} />`}
          actions=${(t, index, view) => html`
            <button type="button" id="branch" disabled=${t === 0 || !run.picture(t, "x_t", index) || asking}
              title="Go on from this x_t with other noise, and with the settings of the form"
              onClick=${() => branch(t, index)}>Branch from here</button>
            <${Menu} words="Download" items=${filesOf(run, index, view.kind)} onError=${setFault} />
            <button type="button" id="code" disabled=${!run.job}
              onClick=${() => setCode(true)}>As code</button>
            ${run.images[index] && html`
              <a class="button" href=${`#noise&picture=${run.id}/${index}`}>Noise this</a>
              <a class="button" href=${`#look&picture=${run.id}/${index}`}>Look inside</a>`}`} />
        ${code && html`<${CodeDialog} run=${run} onClose=${() => setCode(false)} />`}`
      : html`<${Before} model=${model} images=${settings.images} />`}
    </div>`;
}

/* Before the first run: a recorded chain, where there is one of this model. */
function Before({ model, images }) {
  const recorded = useRecorded(model);
  if (!recorded) return html`<${Blank} images=${images} />`;
  return html`<${Stage} run=${recorded} head=${html`<p class="lead">A recording of the model that comes
    with ddpm-serve: nine digits out of one and the same noise. Slide it; Generate draws your own.</p>`} />`;
}

const Blank = ({ images }) => html`<div class="stage blank">
  <div class="grid" style=${{ "--columns": Math.ceil(Math.sqrt(images)) }}>
    ${Array.from({ length: images }, () => html`<span class="picture void"></span>`)}</div></div>`;
