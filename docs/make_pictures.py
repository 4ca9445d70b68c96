"""Write docs/pictures/graph_diff.svg: what `print(graph_diff(model, quantized))` shows of the word language model.

python -m docs.make_pictures
"""

import html
import pathlib
import re

import torch

from fxquant import convert_fx, default_dynamic_qconfig_mapping, graph_diff, prepare_fx
from tutorials.word_language_model.model import WordLanguageModel

PICTURE = pathlib.Path(__file__).parent / "pictures" / "graph_diff.svg"

_TITLE = "graph_diff of a word language model: encoder, rnn and decoder became int8"
_COLUMN, _LINE, _MARGIN = 8.4, 19, 18
_CLASSES = {"~": "changed", "+": "added", "-": "gone"}
_STYLE = """.paper{fill:#fff;stroke:#d0d7de}
text{font:14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;fill:#1f2328}
.changed{fill:#8a5a00}.added{fill:#1a7f37}.gone{fill:#c2410c}
@media(prefers-color-scheme:dark){.paper{fill:#16191d;stroke:#3d444d}text{fill:#e6edf3}
.changed{fill:#e3b341}.added{fill:#57b06f}.gone{fill:#fb923c}}"""


def told() -> str:
    """Return the printed diff of the word language model; its sizes do not depend on training."""
    with torch.device("meta"):
        model = WordLanguageModel(33278, 512, 256, 5).eval()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    words, hidden = torch.zeros(25, 1, dtype=torch.int64), model.init_hidden(1)
    quantized = convert_fx(prepare_fx(model, default_dynamic_qconfig_mapping(), (words, hidden)))
    return str(graph_diff(model, quantized, color=False)).replace("; ", "\n")  # the last line is the longest


def picture(text: str) -> str:
    """Return a printed diff as an SVG, with each line coloured by its sign."""
    lines, drawn, kind = text.split("\n"), [], ""
    for number, line in enumerate(lines):
        if line[:8].strip() or not line:  # not a line that continues a cell
            kind = _CLASSES.get(line[:1], "") if line[1:2] == " " else ""
        y = _MARGIN + 12 + number * _LINE
        for match in re.finditer(r"\S+(?: \S+)*", line):  # cells are two blanks apart
            x = _MARGIN + match.start() * _COLUMN
            width = len(match[0]) * _COLUMN
            drawn.append(
                f'<text x="{x:.0f}" y="{y}" class="{kind}" textLength="{width:.0f}">{html.escape(match[0])}</text>'
            )
    width = round(max(map(len, lines)) * _COLUMN + 2 * _MARGIN)
    height = len(lines) * _LINE + 2 * _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">\n'
        f'<title id="title">{_TITLE}</title>\n<style>\n{_STYLE}\n</style>\n'
        f'<rect class="paper" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="8"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(picture(told()), encoding="utf8")
