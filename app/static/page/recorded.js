/* A chain recorded of the model that comes with the service, for who has not run anything yet. */

import { useEffect, useState } from "./vendor/preact-htm.js";
import { Run } from "./runs.js";

const RECORDED = new Set(["mnist"]);
const asked = new Map(); // name → Promise of a Run, or of null

/* `benchmarks/recorded.py` made it: a row a t, x_t of all images, then x̂_0. The
   finished images, which are examples too, are without loss. */
async function load(model) {
  const folder = "static/page/recorded";
  const { size: [height, width], t, request } = await (await fetch(`${folder}/${model.name}.json`)).json();
  const [, h, w] = model.shape;
  if (h !== height || w !== width) return null;
  const [sheet, finished] = await Promise.all(["", "-images"].map(async (part) => {
    const image = Object.assign(new Image(), { src: `${folder}/${model.name}${part}.webp` });
    await image.decode();
    return image;
  }));
  const paper = Object.assign(document.createElement("canvas"), { width, height }).getContext("2d");
  const cell = (from, column, row) => {
    paper.drawImage(from, column * width, row * height, width, height, 0, 0, width, height);
    return paper.canvas.toDataURL("image/png");
  };
  const run = new Run("recorded", { kind: "generate", model: model.name, status: "succeeded", request });
  const n = request.num_images;
  for (let i = 0; i < n; i++) {
    run.put(0, "image", i, cell(finished, i, 0));
    t.forEach((time, row) => {
      run.put(time, "x_t", i, cell(sheet, i, row));
      run.put(time, "x_start", i, cell(sheet, n + i, row));
    });
  }
  return run;
}

/* An empty one until it is there, so that nothing moves then; null: there is none of this model. */
const empty = (model) => (RECORDED.has(model.name)
  ? new Run("recorded", { kind: "generate", model: model.name, status: "succeeded",
    request: { num_images: 9 } }) : null);

export function useRecorded(model) {
  const [run, setRun] = useState(() => empty(model));
  useEffect(() => {
    let here = true;
    setRun(empty(model));
    if (!RECORDED.has(model.name)) return undefined;
    if (!asked.has(model.name)) {
      asked.set(model.name, load(model).catch(() => {
        asked.delete(model.name); // the next place asks again
        return null;
      }));
    }
    asked.get(model.name).then((found) => here && setRun(found));
    return () => { here = false; };
  }, [model.name]);
  return run;
}
