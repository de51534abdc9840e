/* The tree of branches: which job went on from which state of which. */

import { html, useEffect, useState } from "./vendor/preact-htm.js";
import { get } from "./api.js";
import { history } from "./history.js";
import { useObservable } from "./observable.js";
import { Picture } from "./parts.js";
import { parentOf } from "./requests.js";
import { jobLink } from "./router.js";

const FURTHEST = 12;

/* The jobs above this one, from the first: known here, or asked of the service. */
async function trunkOf(id) {
  const above = [];
  for (let next = id; next && above.length < FURTHEST;) {
    const known = history.of(next);
    const job = known ?? await get(`jobs/${next}`).then(({ kind, request, created_at }) =>
      ({ id: next, kind, created: created_at, title: kind, parent: parentOf(request), done: true }),
    () => null);
    if (!job) break;
    above.unshift(job);
    next = job.parent?.job;
  }
  return above;
}

function Node({ job, below, current }) {
  const children = below.filter((other) => other.parent?.job === job.id);
  const [picture] = useState({ url: `jobs/${job.id}/grid.png?px=128` });
  const words = job.parent ? `t = ${job.parent.t}` : "from noise";
  return html`<li>
    <a href=${jobLink(job.id)} aria-current=${job.id === current ? "true" : undefined}>
      <${Picture} picture=${job.done ? picture : null} alt="" />
      <span><b>${job.title}</b> ${words}</span></a>
    ${children.length > 0 && html`<ul>${children.map((child) =>
      html`<${Node} key=${child.id} job=${child} below=${below} current=${current} />`)}</ul>`}
  </li>`;
}

export function Branches({ id }) {
  useObservable(history);
  const [above, setAbove] = useState([]);
  useEffect(() => {
    let here = true;
    trunkOf(id).then((found) => here && setAbove(found));
    return () => { here = false; };
  }, [id]);
  const [root] = above;
  const known = [...history.all].reverse();
  const all = [...above.filter(({ id: one }) => !history.of(one)), ...known];
  if (!root || !all.some((job) => job.parent?.job === root.id)) return null;
  return html`<nav class="branches" aria-label="Branches">
    <h2>Branches</h2><ul><${Node} job=${root} below=${all} current=${id} /></ul></nav>`;
}
