"""A chat that goes on where it ended:  python notebook.py NOTEBOOK [MODEL.gguf]

Its messages, its cache and its KV log are in one session file: started again, it reads nothing
twice. Replies go to standard output, what the cache does to standard error.
"""

import sys
from pathlib import Path

from kvp_edge import ContextLengthError, Llama, SessionError
from kvp_edge.bundled import bundled_model


def tell(text):
    print(text, file=sys.stderr)


def show(recall):
    tell(f"({recall.n_tokens} dropped tokens came back for this reply)")


def write(llm, messages):
    """The reply, which is printed as it comes."""
    reply = ""
    for chunk in llm.create_chat_completion(messages, stream=True, max_tokens=300, temperature=0.0):
        piece = chunk["choices"][0]["delta"].get("content") or ""
        print(piece, end="", flush=True)
        reply += piece
    print()
    return {"role": "assistant", "content": reply}


def main(file, model):
    llm = Llama(str(model), n_ctx=0, kv_budget=512, on_recall=show, verbose=False)
    messages = llm.load_session(file) if file.exists() else []
    tell(f"{len(messages)} messages so far; an empty line ends this.")
    while text := sys.stdin.readline().strip():
        messages.append({"role": "user", "content": text})
        messages.append(write(llm, messages))
        llm.save_session(file, messages)
        stats = llm.kv_stats
        tell(f"({stats.kept} of {stats.seen} tokens are in the cells)")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else bundled_model())
    except (ContextLengthError, SessionError) as error:
        sys.exit(f"{error}\n{sys.argv[1]} is as it was after the last reply.")
