/* The same request as a line for a shell, a script in Python, or one in JavaScript. */

import { connection } from "./api.js";
import { ownPictures, plain } from "./requests.js";

/* The pictures that it brings, by how many: people have theirs in files. */
const FILES = [[], ["picture.png"], ["first.png", "second.png"]];

const root = () => new URL(".", location.href.split("#")[0]).href.replace(/\/$/, "");
const quoted = (text) => `'${text.replace(/'/g, "'\\''")}'`;
const inPython = (body) =>
  body.replace(/\btrue\b/g, "True").replace(/\bfalse\b/g, "False").replace(/\bnull\b/g, "None");

export function recipes(kind, request) {
  const files = FILES[ownPictures(kind, request)];
  const body = JSON.stringify(plain(request));
  const folder = root();
  const of = { kind, body, files, folder, url: `${folder}/${kind}`, key: Boolean(connection.key) };
  return { curl: shell(of), Python: python(of), JavaScript: script(of) };
}

/* Location leads to the job; asked for with `wait` it answers as soon as it has ended. */
function shell({ body, files, folder, url, key, kind }) {
  const what = files.length
    ? [...files.map((name) => `-F image=@${name}`),
      `-F ${quoted(`request=${body};type=application/json`)}`].join(" ")
    : `--json ${quoted(body)}`;
  const curl = `curl -sS${key ? " -H 'Authorization: Bearer KEY'" : ""}`;
  const result = kind === "likelihood" ? `"$job"` : `-f -o images.png "$job/grid.png"`;
  return `job=${folder}$(${curl} --fail-with-body -o /dev/stderr -w '%header{location}' ${what} ${url}) &&
while ${curl} "$job?wait=20" | grep -Eq '"status": ?"(queued|running)"'; do :; done &&
${curl} ${result}
`;
}

function python({ body, files, folder, url, key, kind }) {
  const headers = `{"Prefer": "wait=60"${key ? ', "Authorization": "Bearer KEY"' : ""}}`;
  const opened = files.map((name) => `("image", open("${name}", "rb"))`).join(", ");
  const sent = files.length
    ? `data={"request": json.dumps(request)}, files=[${opened}]` : "json=request";
  const result = kind === "likelihood" ? 'print(job["result"])'
    : `with open("images.png", "wb") as file:
        file.write(client.get("${folder}" + job["urls"]["grid"]).raise_for_status().content)`;
  return `${files.length ? "import json\n\n" : ""}import httpx

request = ${inPython(body)}
with httpx.Client(headers=${headers}, timeout=90) as client:
    job = client.post("${url}", ${sent}).raise_for_status().json()
    while job["status"] in ("queued", "running"):
        job = client.get("${folder}" + job["urls"]["self"] + "?wait=20").raise_for_status().json()
    print(job["status"])
    ${result}
`;
}

function script({ body, files, folder, url, key, kind }) {
  const auth = key ? ', "Authorization": "Bearer KEY"' : "";
  const form = `const form = new FormData();
form.append("request", new Blob([JSON.stringify(request)], {type: "application/json"}));
// files: of an <input type="file">, ${files.join(" and ")}
for (const file of files) form.append("image", file);
`;
  const sent = files.length ? "form" : "JSON.stringify(request)";
  const type = files.length ? "" : '"Content-Type": "application/json", ';
  const result = kind === "likelihood" ? "console.log(job.result);"
    : `const grid = await fetch("${folder}" + job.urls.grid, {headers: {${auth.slice(2)}}});
const images = await grid.blob(); // a PNG; in a page, URL.createObjectURL(images) is its address`;
  return `const request = ${body};
${files.length ? form : ""}const headers = {${type}"Prefer": "wait=60"${auth}};
let reply = await fetch("${url}", {method: "POST", headers, body: ${sent}});
let job = await reply.json();
while (job.status === "queued" || job.status === "running") {
  reply = await fetch("${folder}" + job.urls.self + "?wait=20", {headers: {${auth.slice(2)}}});
  job = await reply.json();
}
if (!reply.ok) throw new Error(job.detail);
console.log(job.status);
${result}
`;
}
