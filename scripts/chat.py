"""Talks with a served model in a terminal: its replies as they come, thoughts folded, and what each reply took.

python -m scripts.chat                                                          what is served from scratch/tiny/serve
python -m scripts.chat --url https://llm.example.org --api-key-file key.txt     what is served anywhere
echo 'What is a Hessian?' | python -m scripts.chat                              one reply on stdout, and nothing else

/reset begins a new conversation, /thinking on and /thinking off say whether to think first, /thoughts shows what was
thought last, /quit or Ctrl-D ends; Ctrl-C ends a reply. An API key comes from the variable API_KEY or a file, never
from the command line.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from time import monotonic

from rich.console import Console
from rich.text import Text

from v4forge.errors import UserError, report, run_main
from v4forge.serving import client, keys
from v4forge.serving.chat import COMMAND, Chat, Reply
from v4forge.serving.deployment import Deployment
from v4forge.units import counted, duration

from .cli import parser_for

FOLDER = Path("scratch/tiny/serve")
COMMANDS = "/reset, /thinking on|off, /thoughts, /quit; Ctrl-C ends a reply"
# What a terminal would obey: a model's words are only shown.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def chat_of(arguments: argparse.Namespace) -> Chat:
    """The conversation that is asked for, with the model that is there. Raises UserError where none is."""
    key = keys.own(keys.read(arguments.api_key_file))
    if arguments.url:
        chat = Chat(client.address(arguments.url, COMMAND), key)
    else:
        deployment = Deployment.load(arguments.folder)
        if deployment is None:
            hint = f"make serve, or {COMMAND} URL=http://<host>:<port>"
            raise UserError(f"nothing is served from {arguments.folder}", hint)
        # Its certificate is for the name that others know it by.
        url = deployment.admin_url if deployment.cert else deployment.url
        chat = Chat(url, key or deployment.key, proxied=False)
    chat.model, chat.system = arguments.model, arguments.system
    chat.thinking, chat.max_tokens = arguments.thinking, arguments.max_tokens
    chat.meet()
    return chat


def shown(text: str) -> str:
    """A text as a terminal may have it."""
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def pipe(chat: Chat, prompt: str) -> None:
    """One reply on stdout, and nothing else."""
    if not prompt.strip():
        raise UserError("there is nothing to ask", f"echo 'What is a Hessian?' | {COMMAND}")
    on_terminal = sys.stdout.isatty()
    with closing(chat.say(prompt, Reply(monotonic()))) as pieces:
        for _, said in pieces:
            sys.stdout.write(shown(said) if on_terminal else said)
            sys.stdout.flush()
    print()


class Terminal:
    """A conversation with a person."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.console = Console(highlight=False)
        self.thoughts = ""

    def run(self) -> None:
        """Until the person ends it."""
        import readline  # noqa: F401, gives input() its keys and history

        context = f", context {self.chat.context:,}" if self.chat.context else ""
        self._tell(f"{self.chat.model} at {self.chat.url}{context}\n{COMMANDS}")
        try:
            while self._turn():
                pass
        except EOFError:
            print()

    def _turn(self) -> bool:
        """What the person types next, and the reply to it -> whether there may be more."""
        try:
            line = input("\n> ").strip()
            if line == "/quit":
                return False
            if line.startswith("/"):
                self._obey(line)
            elif line:
                self._answer(line)
        except KeyboardInterrupt:  # one too many, or of a line that was not finished
            pass
        return True

    def _obey(self, line: str) -> None:
        command, _, value = line.partition(" ")
        if command == "/reset":
            self.chat.turns.clear()
            self._tell("a new conversation")
        elif command == "/thinking" and value.strip() in ("on", "off"):
            self.chat.thinking = value.strip() == "on"
            self._tell("it thinks first" if self.chat.thinking else "it answers at once")
        elif command == "/thoughts":
            self._tell(self.thoughts or "nothing was thought")
        else:
            self._tell(COMMANDS)

    def _answer(self, prompt: str) -> None:
        """Shows the reply as it comes, then what it took."""
        reply, ended = Reply(monotonic()), []
        pieces = self.chat.say(prompt, reply)
        try:
            with closing(pieces), self.console.status("waiting for the first token") as status:
                for thought, said in pieces:
                    if thought and not reply.text:
                        status.update(Text(f"thinking, {counted(len(reply.thoughts), 'characters')}"))
                    if said and reply.text == said:
                        status.stop()
                        self._fold(reply)
                    self.console.out(shown(said), end="", highlight=False)
        except KeyboardInterrupt:
            ended = ["stopped"]
        except UserError as error:
            if reply.text:
                print(flush=True)
            report(error)
        if reply.text:
            print()
        else:
            self._fold(reply)
        self.thoughts = reply.thoughts
        if told := ", ".join(filter(None, [reply.figures, *ended])):
            self._tell(told)

    def _fold(self, reply: Reply) -> None:
        if reply.thoughts:
            took = duration(reply.last_s - reply.first_s)
            self._tell(f"thought for {took}, {counted(len(reply.thoughts), 'characters')}; /thoughts shows them")

    def _tell(self, text: str) -> None:
        self.console.print(Text(shown(text), style="dim"))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_for("chat", __doc__)
    add = parser.add_argument
    add("--folder", type=Path, default=FOLDER, metavar="DIR",
        help="of what make serve has started; default: %(default)s")  # fmt: skip
    add("--url", default="", help="of a server instead, http://host:port")
    add("--model", default="", metavar="NAME", help="of several that are served")
    add("--system", default="", metavar="TEXT", help="the system prompt")
    add("--max-tokens", type=int, default=0, metavar="N", help="of a reply; default: what fits")
    add("--thinking", action="store_true", help="let it think first")
    add("--api-key-file", default="", metavar="FILE",
        help="the key; default: the variable API_KEY, else, of what make serve has started, its own")  # fmt: skip
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    chat = chat_of(arguments)
    if sys.stdin.isatty():
        Terminal(chat).run()
    else:
        pipe(chat, sys.stdin.read())


if __name__ == "__main__":
    run_main(main)
