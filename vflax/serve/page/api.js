// What is said to the server, and what it says: the part of OpenAI's protocol that a chat needs.

let limits = null;

// {model, max_length, max_images, max_image_pixels, max_request_bytes, defaults, needs_key, ...}; null while unknown.
export const config = () => limits;

export async function readConfig() {
  limits ??= await answerOf(await reach("page/config.json", {}));
  return limits;
}

// Why there is no answer, or not all of it, in words for the person.
// kind: offline, broken, key, busy, long, large, refused, server. wait: seconds after which to try again, if known.
export class Failure extends Error {
  constructor(kind, message, wait = 0) {
    super(message);
    this.kind = kind;
    this.wait = wait;
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("offline", navigator.onLine
      ? "The server cannot be reached. It may have been stopped, or the network is down."
      : "You are offline. Connect to the network, then try again.");
  }
}

async function answerOf(response) {
  if (!response.ok) throw await failureOf(response);
  return response.json();
}

async function failureOf(response) {
  const error = await response.json().then((body) => body.error ?? {}, () => ({}));
  const wait = Number(response.headers.get("retry-after")) || 0;
  return explain(response.status, error, wait);
}

// The server's error in plain words, its own words included where they help.
function explain(status, error, wait = 0) {
  const said = sentence(error, status);
  if (status === 401) return new Failure("key", "The server wants an API key that it knows.");
  if (status === 429) return new Failure("busy", `The server is busy. ${said}`, wait);
  if (status === 413) return new Failure("large", `The request is too large for this server. ${said}`);
  if (error.code === "context_length_exceeded") {
    return new Failure("long", `This conversation is too long for the model. ${said} `
      + "Start a new conversation, shorten a message, or lower “max tokens”.");
  }
  if (status === 503) return new Failure("busy", `The server takes no questions now. ${said}`, wait);
  if (status >= 500) return new Failure("server", `The server could not answer. ${said}`, wait);
  return new Failure("refused", `The server did not take the question. ${said}`);
}

// The server's own words, without the field of the request that they may begin with.
function sentence({ message, param }, status) {
  const text = String(message || `status ${status}`);
  const trimmed = (text.startsWith(`${param}: `) ? text.slice(param.length + 2) : text).trim().slice(0, 600);
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}

// Sends a conversation and gives what comes: {text}, {finish}, {usage}.
// Throws Failure, or AbortError when `signal` says so.
export async function* ask(body, key, signal) {
  const text = JSON.stringify(body);
  const size = new Blob([text]).size;
  if (limits && size > limits.max_request_bytes) {
    throw new Failure("large", `Text and pictures are ${megabytes(size)} together, and this server takes `
      + `${megabytes(limits.max_request_bytes)}. Remove pictures, or start a new conversation.`);
  }
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await reach("v1/chat/completions", { method: "POST", headers, body: text, signal });
  if (!response.ok) throw await failureOf(response);
  let complete = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = parse(data);
    if (chunk.error) throw explain(500, chunk.error);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (chunk.usage) yield { usage: chunk.usage };
    complete ||= Boolean(choice?.finish_reason);
  }
  if (!complete) throw broken();
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw broken();
  }
}

function broken() {
  return new Failure("broken", "The connection was lost before the answer was complete.");
}

// The data of the server-sent events in a stream of bytes; lines of other kinds are left out.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw broken();
  } finally {
    reader.cancel().catch(() => {}); // a stream that broke cannot be cancelled either
  }
}

function megabytes(bytes) {
  return `${(bytes / 2 ** 20).toFixed(1)} MB`;
}
