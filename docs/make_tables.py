"""Write the tables of docs/solvers.md: python docs/make_tables.py. What stands between its markers comes from here."""

from pathlib import Path

from jaxdiff import SOLVERS, grid_at, make_process, make_table

PAGE = Path(__file__).parent / "solvers.md"
BEGIN, END = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
OPTIONS = {"lms": {"order": 3}, "edm": {"s_churn": 1.5, "s_tmax": 3.0}}
LEVELS = {"pndm": [8, 4, 2, 1]}  # which needs four steps


def combination(weights: list[tuple[float, str]]) -> str:
    """A sum such as "0.5 x - 2 D"; nothing for an image that is not used."""
    text = ""
    for weight, name in weights:
        number = f"{abs(weight):.3f}".rstrip("0").rstrip(".")
        if number != "0":
            sign = "-" if weight < 0 else "+"
            text += f" {sign} {name}" if number == "1" else f" {sign} {number} {name}"
    return text.removeprefix(" + ").strip()


def show(name: str) -> str:
    """One solver's table on three steps of the EDM process, as assignments."""
    options = OPTIONS.get(name, {})
    table = make_table(name, grid_at(make_process("edm"), LEVELS.get(name, [4, 2, 1])), **options)
    rows, images = table.v.shape
    names = ["x", *"abcdefg"[: images - 1]]
    cells = [["sigma", *(f"{image} <-" for image in names)]]
    for i in range(rows):
        cells.append([f"{table.sigma[i]:.3f}".rstrip("0").rstrip(".")])
        for j in range(images):
            weights = [*zip(table.M[i, j], names, strict=True), (table.v[i, j], "D"), (table.n[i, j], "z")]
            cells[-1].append(combination(weights))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    said = "".join(f", {key} {value}" for key, value in options.items())
    return f"**{name}**{said}: {SOLVERS[name].about}.\n\n```text\n" + "\n".join(lines) + "\n```\n"


def page(text: str) -> str:
    """The page with its tables written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n" + "\n".join(map(show, SOLVERS)) + "\n" + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
