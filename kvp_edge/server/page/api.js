// What the page asks of the server. Addresses are relative: the server may stand behind a prefix.

import { session } from "./memory.js";
import { eventData } from "./sse.js";

const KEY = "kvp-key";
let askForKey = async () => null;

/** Something went wrong, said in a sentence for the reader. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => session.get(KEY) ?? "",
  set: (value) => session.set(KEY, value),
  /** `ask(why)` resolves to a key, or to null if the user has none. */
  askWith: (ask) => { askForKey = ask; },
};

/** `asks`: whether the user is asked for a key where one is needed. */
async function request(path, { asks = true, ...options } = {}) {
  for (;;) {
    const sent = key.get();
    const headers = { ...options.headers };
    if (sent) headers.Authorization = `Bearer ${sent}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server does not answer. Is kvp-edge serve still running?");
    }
    if (response.ok) return response;
    const error = await asError(response);
    if (response.status !== 401 || !asks) throw error;
    // another request may have got a key in the meantime
    if (key.get() === sent && !(await askForKey(sent ? error.message : ""))) throw error;
  }
}

async function asError(response) {
  let said;
  try {
    said = (await response.json()).error.message;
  } catch {
    said = null; // a proxy answers in its own way
  }
  said ||= `The server answered with status ${response.status}`;
  return new ServerError(sentence(said), response.status);
}

const sentence = (text) => {
  const said = text.trim();
  return said[0].toUpperCase() + said.slice(1) + (/[.!?]$/.test(said) ? "" : ".");
};

const json = async (path, options) => (await request(path, options)).json();

/** The name of the model that is served. */
export const model = async () => (await json("v1/models")).data[0].id;

export const chats = async () => (await json("kvp/chats")).chats;

export const chat = (id) => json(`kvp/chats/${encodeURIComponent(id)}`);

export const deleteChat = (id) => request(`kvp/chats/${encodeURIComponent(id)}`, { method: "DELETE" });

/** What the cells hold; texts of tokens from number `from` on if `id` is the chat in them. As this is
 * asked again and again, it asks for no key. */
export function cache(id, from) {
  const query = new URLSearchParams({ texts_from: from });
  if (id !== null) query.set("chat", id);
  return json(`kvp/cache?${query}`, { asks: false });
}

/** The chunks of a reply, as they come. */
export async function* reply(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  let complete = false;
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") {
        complete = true; // and the connection is read to its end, so that it can be used again
        continue;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(sentence(chunk.error.message));
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection to the server broke before the reply was complete.");
  }
  if (!complete) throw new ServerError("The server ended the stream before the reply was complete.");
}
