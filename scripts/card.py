"""Writes an artifact's model card, README.md, from what its manifest, certificate and the reports of --work say.

Also run.json, which says on which machine, in which images, by which commands and in how many seconds it was made, and
the card as a page, reports/card.html. What was not measured is said to be not measured.
"""

from __future__ import annotations

from pathlib import Path

from v4forge.artifact_folder import CARD
from v4forge.errors import run_main
from v4forge.files import remove_leftovers, write_text

from .cli import parser_for

PAGE = "reports/card.html"


def main() -> None:
    parser = parser_for("card", __doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="scratch/<profile>: layers, reports")
    parser.add_argument("--artifact", type=Path, required=True, metavar="DIR", help="gets README.md and run.json")
    arguments = parser.parse_args()

    from v4forge.reporting import card, card_html, card_subject, run_record

    card_subject.require(arguments.artifact)
    remove_leftovers(arguments.artifact)
    run_record.write(arguments.work, arguments.artifact)
    subject = card_subject.gathered(arguments.work, arguments.artifact)
    text = card.text(subject)
    write_text(arguments.artifact / CARD, text)
    write_text(arguments.work / PAGE, card_html.page(text))
    warning = card.warning(subject)
    print(f"card: {arguments.artifact / CARD}, {arguments.work / PAGE}" + (f"; it says: {warning}" if warning else ""))


if __name__ == "__main__":
    run_main(main)
