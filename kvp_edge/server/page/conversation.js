// One chat: its messages, and the reply that is being written.

import * as api from "./api.js";

const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Text of a message's content, which may come in parts. */
export function textOf(message) {
  const { content } = message;
  if (typeof content === "string") return content;
  if (Array.isArray(content)) return content.map((part) => part.text ?? "").join("");
  return "";
}

export class Conversation {
  id = null; // the server's, once it has answered
  messages = [];
  versions = []; // see branches.js
  error = null; // why there is no reply to the last message, or why it ends early
  refused = false; // the server will not take the last message, however often it is tried
  finish = null; // the server's reason why the last reply ended
  #stopping = null; // an AbortController, while a reply is written
  #settled = Promise.resolve();
  #onChange;

  /** `onChange(conversation, what)`: "id", "text" (the last message grew) or "all". */
  constructor(onChange, { id = null, messages = [], origin = null } = {}) {
    this.#onChange = onChange;
    this.id = id;
    this.messages = messages;
    this.origin = origin; // the chat that it branches from
  }

  get writing() {
    return this.#stopping !== null;
  }

  /** Whether the last message waits for a reply. */
  get unanswered() {
    return this.messages.at(-1)?.role === "user";
  }

  stop() {
    this.#stopping?.abort();
  }

  /** Have the server reply to the messages. How that ended is in `error` and `finish`.
   *
   * @param options model, temperature... of the request, without what the server decides. */
  async reply(options) {
    if (this.writing) return;
    const stopping = (this.#stopping = new AbortController());
    this.error = this.finish = null;
    this.refused = false;
    this.#onChange(this, "all");
    await this.#settled; // the server may know the end of a stopped reply better
    // a reply that broke off is not gone on with, but written again
    const asked = this.messages.slice(0, this.messages.findLastIndex((each) => each.role !== "assistant") + 1);
    const said = { role: "assistant", content: "" };
    try {
      stopping.signal.throwIfAborted();
      for await (const chunk of api.reply({ ...options, messages: asked }, stopping.signal)) {
        if (chunk.chat_id && chunk.chat_id !== this.id) {
          this.id = chunk.chat_id;
          this.#onChange(this, "id");
        }
        const choice = chunk.choices?.[0];
        if (choice?.finish_reason) this.finish = choice.finish_reason;
        const text = choice?.delta?.content;
        if (!text) continue;
        const begins = said.content === "";
        said.content += text;
        this.messages = [...asked, said];
        this.#onChange(this, begins ? "all" : "text");
      }
    } catch (error) {
      if (stopping.signal.aborted) this.finish = "stopped";
      else [this.error, this.refused] = [error.message, error.status === 400];
    }
    this.#stopping = null;
    this.#settled = this.#settle(asked, said);
    this.#onChange(this, "all");
    await this.#settled;
    this.#onChange(this, "settled");
  }

  /** Take over what the server has stored. A reply that was stopped ends there perhaps a token later,
   * and only with exactly this text does the next message continue the chat. */
  async #settle(asked, said) {
    if (this.id === null) return;
    let before = null;
    for (let tries = 0; tries < 20; tries++) {
      let chat;
      try {
        const stored = (await api.chats()).some((each) => each.id === this.id);
        chat = stored ? await api.chat(this.id) : { messages: [] };
      } catch {
        return; // what was seen is what there is
      }
      const theirs = chat.messages[asked.length];
      const ended = chat.messages.length === asked.length + 1 && theirs.role === "assistant";
      if (ended && (this.finish !== "stopped" || textOf(theirs) === before)) {
        this.messages = chat.messages;
        return;
      }
      const stoppedBefore = said.content === "" && chat.messages.length === asked.length;
      if (stoppedBefore || (!ended && this.error !== null)) return;
      before = ended ? textOf(theirs) : null;
      await wait(100);
    }
  }
}
