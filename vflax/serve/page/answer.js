// Asks the server for an answer and writes it into a turn.

import { ask, config, Failure, readConfig } from "./api.js";
import { dataUrl } from "./pictures.js";
import { key, parameters, systemPrompt } from "./settings.js";

const AT_ONCE = 50; // ms

// The conversation as the protocol has it. Answers without a word are left out; the messages around one become one, for
// user and model take turns.
async function messagesOf(turns, pictures) {
  const messages = [];
  for (const turn of turns) {
    if (turn.role === "assistant") {
      if (turn.text) messages.push({ role: "assistant", content: turn.text });
      continue;
    }
    const parts = [];
    for (const id of turn.pictures) {
      parts.push({ type: "image_url", image_url: { url: await dataUrl(pictures.get(id).blob) } });
    }
    if (turn.text) parts.push({ type: "text", text: turn.text });
    const before = messages.at(-1);
    if (before?.role === "user") before.content.push(...parts);
    else messages.push({ role: "user", content: parts });
  }
  return messages;
}

export const emptyAnswer = () => ({ role: "assistant", text: "", state: "writing", problem: null, usage: null, speed: null });

// Fills `turn`, an empty answer to `turns`; calls onText() as it grows. Never throws: what goes wrong is in turn.problem,
// and turn.state is done, length, stopped or failed.
export async function write(turn, turns, pictures, signal, onText) {
  try {
    await readConfig();
    const system = systemPrompt();
    const messages = await messagesOf(turns, pictures);
    if (system) messages.unshift({ role: "system", content: system });
    const { model } = config();
    const body = { model, messages, stream: true, stream_options: { include_usage: true }, ...parameters() };
    turn.state = await follow(turn, ask(body, key(), signal), onText);
  } catch (error) {
    if (error.name === "AbortError") {
      turn.state = "stopped";
      return;
    }
    if (!(error instanceof Failure)) console.error(error);
    turn.state = "failed";
    const { kind = "page", message, wait = 0 } = error;
    turn.problem = { kind, message, until: Date.now() + wait * 1000 };
  }
}

async function follow(turn, pieces, onText) {
  const start = performance.now();
  let [first, last, state] = [0, 0, "done"];
  for await (const { text, finish, usage } of pieces) {
    if (text) {
      last = performance.now();
      first ||= last;
      turn.text += text;
      onText();
    }
    if (finish === "length") state = "length";
    else if (finish && finish !== "stop") throw new Failure("server", "The server broke off the answer.");
    if (usage) turn.usage = { prompt: usage.prompt_tokens, answer: usage.completion_tokens };
  }
  if (turn.usage && first) turn.speed = speed(turn.usage.answer, start, first, last);
  return state;
}

// Tokens a second, times being in ms. The wait for the first one is not counted, unless all came at about once.
function speed(tokens, start, first, last) {
  const [number, time] = last - first > AT_ONCE ? [tokens - 1, last - first] : [tokens, last - start];
  return (1000 * number) / Math.max(1, time);
}
