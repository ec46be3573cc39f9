// A file that the server classifies in the background: chosen, followed, downloaded.

import { ask, fetchFile } from "./api.js";
import { byId, describe, make, percent, say } from "./dom.js";

const LOOK_AGAIN = 500;
const KINDS = {
  csv: "text/csv", jsonl: "application/x-ndjson", ndjson: "application/x-ndjson",
  parquet: "application/vnd.apache.parquet",
};
const UNFINISHED = new Set(["queued", "running"]);

let job = null;

/** Serve the form; `optionsOf` returns the model and the quality that are chosen on the page. */
export function offerJobs(optionsOf) {
  byId("job").addEventListener("submit", event => {
    event.preventDefault();
    const [file] = byId("job-file").files;
    if (file) attempt(() => submit(file, optionsOf()));
  });
  byId("job-save").onclick = () => attempt(save);
  byId("job-cancel").onclick = () => attempt(cancel);
}

async function attempt(work) {
  try {
    await work();
  } catch (error) {
    tell([error.title, error.message].filter(Boolean).join(" "));
  }
}

async function submit(file, options) {
  const kind = KINDS[file.name.split(".").pop().toLowerCase()];
  if (!kind) return tell("A file is CSV, JSONL or Parquet, and its name says which.");
  byId("job-send").disabled = true;
  tell("Sending the file.");
  try {
    const { content } = await ask(`jobs?${new URLSearchParams(options)}`, { body: file, kind });
    show(content);
    await follow(content.id);
  } finally {
    byId("job-send").disabled = false;
  }
}

/** Look at a job until it has ended, or another one is shown. */
async function follow(id) {
  while (job?.id === id && UNFINISHED.has(job.status)) {
    await new Promise(resolve => setTimeout(resolve, LOOK_AGAIN));
    let content;
    try {
      ({ content } = await ask(`jobs/${id}`));
    } catch (error) {
      if (error.status && error.status !== 503) throw error;
      tell(`Waiting for the server. ${error.message}`);
      continue;
    }
    if (job?.id === id) show(content);
  }
}

async function save() {
  const { id, format } = job;
  const url = URL.createObjectURL(await fetchFile(`jobs/${id}/result`));
  make("a", { href: url, download: `${id}.${format}` }).click();
  URL.revokeObjectURL(url);
}

async function cancel() {
  const { id } = job;
  const { content } = await ask(`jobs/${id}`, { method: "DELETE" });
  show(content);
  byId("job-save").hidden = byId("job-cancel").hidden = true;
  tell(content.status === "cancelled" ? "Cancelled: the file and its answers are gone." : "Removed.");
  job = null;
}

function show(found) {
  job = found;
  const { status, read_share: share, rows, waiting_for: waiting, error } = found;
  byId("job-progress").hidden = !UNFINISHED.has(status);
  byId("job-progress").value = share;
  byId("job-save").hidden = status !== "finished";
  byId("job-cancel").hidden = false;
  byId("job-cancel").textContent = UNFINISHED.has(status) ? "Cancel" : "Remove";
  describe(byId("job-figures"), rows ? figures(found) : []);
  tell({
    queued: "Waiting for its turn.",
    running: waiting ? `Waiting: ${waiting}.` : "Classifying.",
    finished: "Finished.",
    failed: `Failed: ${error}`,
  }[status] ?? status);
}

function figures(found) {
  const left = found.seconds_left, labels = Object.entries(found.labels).sort((a, b) => b[1] - a[1]);
  return [
    ["rows", found.rows.toLocaleString("en")],
    ["read", percent(found.read_share, 0)],
    ["rows per second", Math.round(found.rows_per_second).toLocaleString("en")],
    ...(left === null ? [] : [["seconds left", Math.ceil(left).toLocaleString("en")]]),
    ["heads of a row", found.mean_heads.toFixed(1)],
    ["multiply-adds", percent(found.macs_share)],
    ...(found.failed_rows ? [["failed rows", found.failed_rows.toLocaleString("en")]] : []),
    ...labels.slice(0, 4).map(([label, count]) => [label, count.toLocaleString("en")]),
  ];
}

const tell = text => say(byId("job-state"), text);
