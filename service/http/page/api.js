// Requests to the server: its key, its errors, its wish to be asked again later.

export const MOST_RETRIES = 60;
/** Where the server is, which need not be the root of its host: this file is in its folder `playground`. */
const SERVER = new URL("..", import.meta.url);
const WORTH_ANOTHER_TRY = new Set([429, 503]);
const TITLES = {
  0: "The server cannot be reached.",
  401: "This server asks for a key.",
  403: "This key does not open that.",
  404: "There is no such thing here.",
  413: "That is too much at once.",
  422: "The server does not take this.",
  429: "The server is busy.",
  503: "The server is not ready.",
  504: "That took too long.",
};

let key = "";

/** Send this key with every request from now on; it is kept nowhere else. */
export function useKey(value) {
  key = value.trim();
}

export class Refusal extends Error {
  constructor(status, message, { param = null, code = null, requestId = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, code, requestId, retryAfter });
  }

  get title() {
    return TITLES[this.status] ?? `The server answered ${this.status}.`;
  }

  get detail() {
    return [
      this.code && `code ${this.code}`,
      this.param && `field ${this.param}`,
      this.requestId && `request ${this.requestId}`,
    ].filter(Boolean).join(" · ");
  }
}

/**
 * Ask once; a `body` that is a file is sent as it is, with its media type `kind`, anything else as JSON.
 * @returns the JSON that came, and the stages' times in milliseconds by name.
 * @throws Refusal, or the AbortError of `signal`.
 */
export async function ask(path, { body, kind, method = body ? "POST" : "GET", signal } = {}) {
  const headers = authorization();
  if (body) headers["content-type"] = kind ?? "application/json";
  let response, content;
  try {
    response = await fetch(new URL(path, SERVER), {
      method, headers, signal, body: body && (kind ? body : JSON.stringify(body)),
    });
    content = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(response?.status ?? 0, "No answer that can be read came back.");
  }
  if (response.ok) return { content, stages: stagesOf(response.headers.get("server-timing") ?? "") };
  const { message = "", param, code } = content.error ?? {};
  throw new Refusal(response.status, message, {
    param, code,
    requestId: response.headers.get("x-request-id"),
    retryAfter: Number(response.headers.get("retry-after")) || 1,
  });
}

/** Fetch a file, which only a request with the key may do. */
export async function fetchFile(path) {
  const response = await fetch(new URL(path, SERVER), { headers: authorization() });
  if (!response.ok) throw new Refusal(response.status, "The file cannot be fetched.");
  return response.blob();
}

const authorization = () => key ? { authorization: `Bearer ${key}` } : {};

/** Ask until there is an answer, as often and as late as the server says; `onWait` hears of it. */
export async function askAgain(path, { onWait = () => {}, ...request } = {}) {
  for (let retry = 1; ; retry++) {
    try {
      return await ask(path, request);
    } catch (error) {
      if (!WORTH_ANOTHER_TRY.has(error.status) || retry > MOST_RETRIES) throw error;
      onWait(error, retry);
      await pause(1000 * error.retryAfter, request.signal);
    }
  }
}

function pause(duration, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, duration);
    signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); }, { once: true });
  });
}

function stagesOf(header) {
  const found = header.matchAll(/([a-z]+);dur=([\d.]+)/g);
  return Object.fromEntries(Array.from(found, ([, name, duration]) => [name, Number(duration)]));
}
