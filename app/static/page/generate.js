/* Generate: pictures from noise, their chains, and branches of those. */

import { html, useState } from "./vendor/preact-htm.js";
import { Branches } from "./branches.js";
import { useAsk, useDesk } from "./desk.js";
import { CodeDialog, Menu, filesOf, manifestIn } from "./files.js";
import { Cancel, NoModels, Progress } from "./parts.js";
import { useRecorded } from "./recorded.js";
import { again, chain, generation, many, shortSeed, stepsFrom } from "./requests.js";
import { service } from "./service.js";
import { ImageCount, MOST_IMAGES, ModelChoice, Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { subject } from "./words.js";

const BRANCHES = 4;

export function Generate({ run }) {
  const desk = useDesk(run);
  const { model } = desk;
  const [fault, setFault] = useState(null);
  const [asking, ask] = useAsk(setFault);
  const [code, setCode] = useState(false);
  if (!model) return html`<${NoModels} service=${service} />`;
  const { settings } = desk;
  const change = (some) => desk.change(some);

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
      await ask(kind, request, { title: subject(request, service.model(request.model)) },
        { lends: true });
    } catch (error) {
      setFault(error);
    }
  };
  const live = run?.live;

  return html`<form class="panel" onSubmit=${generate} aria-label="What to generate">
      <${ModelChoice} model=${model} onChange=${(name) => desk.choose(name)}
        thumbnail=${run?.images[0]} />
      <${Settings} model=${model} settings=${settings} onChange=${change}>
        <${ImageCount} settings=${settings} onChange=${change} />
      <//>
      <div class="submit">
        <button class="go" id="go" disabled=${asking || live}>Generate</button>
        <${Cancel} run=${run} onError=${setFault} />
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
              title=${`Go on from this x_t with other noise, by ${many(model, settings).sampler}`}
              onClick=${() => branch(t, index)}>Branch from here</button>
            <${Menu} words="Download" items=${filesOf(run, index, view.kind)} onError=${setFault} />
            <button type="button" id="code" disabled=${!run.job}
              onClick=${() => setCode(true)}>As code</button>
            ${run.images[index] && html`
              <a class="button" href=${`#noise&picture=${run.id}/${index}`}>Noise this</a>
              <a class="button" href=${`#look&picture=${run.id}/${index}`}>Look inside</a>`}`} />
        <${CodeDialog} open=${code} run=${run} onClose=${() => setCode(false)} />`
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

/* As many as will be drawn, whatever is being written in the form. */
function Blank({ images }) {
  const cells = Math.max(1, Math.min(MOST_IMAGES, images));
  return html`<div class="stage blank">
    <div class="grid" style=${{ "--columns": Math.ceil(Math.sqrt(cells)) }}>
      ${Array.from({ length: cells }, () => html`<span class="picture void"></span>`)}</div></div>`;
}
