"""What a solver is: a table of small matrices, and the tape that turns an algorithm, as a paper writes it, into one."""

from typing import NamedTuple

import numpy as np

from jaxdiff.errors import JaxdiffError
from jaxdiff.schedules import Node


class SolverTable(NamedTuple):
    """N rows, one evaluation of the network each, over m images S (Butcher 1966's general linear methods).

    Row i evaluates D = denoise(S[0]; t_i, alpha_i, sigma_i) and sets S <- M_i S + v_i D + n_i z with z ~ N(0, I).
    t, alpha, sigma: [N]. M: [N, m, m]. v, n: [N, m]. All NumPy float64 where a solver makes them.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    M: np.ndarray
    v: np.ndarray
    n: np.ndarray

    @property
    def node(self) -> Node:
        """The nodes at which the rows evaluate."""
        return Node(self.t, self.alpha, self.sigma)


def pad_table(table: SolverTable, images: int) -> SolverTable:
    """The same table over more images, which stay zero: tables of one shape share one compiled program.

    Raises JaxdiffError where the table has more images than asked for.
    """
    extra = images - table.v.shape[1]
    if extra < 0:
        raise JaxdiffError(f"A table of {table.v.shape[1]} images can not be padded to {images}.")
    M = np.pad(table.M, [(0, 0), (0, extra), (0, extra)])
    return table._replace(M=M, v=np.pad(table.v, [(0, 0), (0, extra)]), n=np.pad(table.n, [(0, 0), (0, extra)]))


def stack_tables(tables: list[SolverTable]) -> SolverTable:
    """Tables of as many rows as one, each field [K, N, ...], padded to common images: what `jax.vmap` takes.

    Raises JaxdiffError where their numbers of rows differ.
    """
    rows = [len(table.t) for table in tables]
    if len(set(rows)) != 1:
        raise JaxdiffError(f"Only tables of as many rows can be stacked, and these have {', '.join(map(str, rows))}.")
    images = max(table.v.shape[1] for table in tables)
    return SolverTable(*map(np.stack, zip(*(pad_table(table, images) for table in tables), strict=True)))


def scale_noise(table: SolverTable, s_noise: float) -> SolverTable:
    """The same table with fresh noise of another standard deviation, 1 being the exact one (Karras et al. 2022, 4)."""
    return table._replace(n=s_noise * table.n)


class Image:
    """A linear combination of what a sampler has at hand: with +, -, * and / it is what an algorithm computes with."""

    __slots__ = ("terms",)

    def __init__(self, terms: dict[int, float]):
        """terms: number of what is combined, as the tape counts, to its coefficient."""
        self.terms = terms

    def __add__(self, other: "Image") -> "Image":
        terms = dict(self.terms)
        for atom, coefficient in other.terms.items():
            terms[atom] = terms.get(atom, 0.0) + coefficient
        return Image(terms)

    def __mul__(self, factor: float) -> "Image":
        return Image({atom: factor * coefficient for atom, coefficient in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Image":
        return self * (1 / divisor)

    def __neg__(self) -> "Image":
        return self * -1.0

    def __sub__(self, other: "Image") -> "Image":
        return self + -other


class Tape:
    """Records an algorithm, and gives its table.

    An algorithm starts from `start`, calls `denoise` for each evaluation of the network and `noise` for the fresh noise
    that it adds after one, combines what it gets, and hands the sample to `table`. What it still uses after the next
    evaluation takes up an image of the table: an x as it was evaluated, a prediction, a noise. A combination that it
    goes on with can be kept as a single one by `keep`.
    """

    def __init__(self):
        """Nothing is recorded yet."""
        self.start = Image({})
        self._nodes: list[Node] = []
        self._evaluated: list[dict[int, float]] = []  # of each row, what its x is a combination of
        self._born: list[int] = []  # of each atom, the row in which it comes to be
        self._kept: dict[int, dict[int, float]] = {}  # of each atom that is kept, what it is a combination of
        self._x: list[int] = []  # of each row, its three atoms
        self._prediction: list[int] = []
        self._noise: list[int] = []

    def _atom(self) -> int:
        self._born.append(len(self._nodes) - 1)
        return len(self._born) - 1

    def denoise(self, x: Image, node: Node) -> Image:
        """One evaluation, a row of the table: the x_0 predicted from x. Afterwards x is counted as one image."""
        self._evaluated.append(x.terms)
        self._nodes.append(Node(node.t, node.alpha, node.sigma))
        self._x.append(self._atom())
        self._prediction.append(self._atom())
        self._noise.append(self._atom())
        x.terms = {self._x[-1]: 1.0}
        return Image({self._prediction[-1]: 1.0})

    def noise(self) -> Image:
        """The noise z ~ N(0, I) of the row last evaluated: always the same until the next evaluation."""
        return Image({self._noise[-1]: 1.0})

    def keep(self, image: Image) -> Image:
        """Count a combination as one image from here on; returns it."""
        atom = self._atom()
        self._kept[atom] = image.terms
        image.terms = {atom: 1.0}
        return image

    def table(self, x: Image) -> SolverTable:
        """The table of what was recorded, whose sample is x."""
        rows = len(self._nodes)
        made = [*self._evaluated[1:], x.terms]  # by each row, as slot 0
        last_use = [-1] * len(self._born)
        for row, terms in enumerate(made):
            for atom in terms:
                last_use[atom] = max(last_use[atom], row)
        for atom, terms in self._kept.items():
            for part in terms:
                last_use[part] = max(last_use[part], self._born[atom])
        # After a row, slot 0 is the next x and the others are what is used later, the newest first.
        live: list[list[int]] = [[] for _ in range(rows)]
        for atom, born in enumerate(self._born):
            for row in range(born, last_use[atom]):
                live[row].insert(0, atom)
        m = 1 + max(map(len, live))
        M, v, n = np.zeros((rows, m, m)), np.zeros((rows, m)), np.zeros((rows, m))
        for row in range(rows):
            columns = {atom: 1 + slot for slot, atom in enumerate(live[row - 1] if row else [])} | {self._x[row]: 0}
            for slot, terms in enumerate([made[row], *({atom: 1.0} for atom in live[row])]):
                for atom, coefficient in self._expanded(terms, row):
                    if atom == self._prediction[row]:
                        v[row, slot] += coefficient
                    elif atom == self._noise[row]:
                        n[row, slot] += coefficient
                    else:
                        M[row, slot, columns[atom]] += coefficient
        return SolverTable(*(np.array(field, np.float64) for field in zip(*self._nodes, strict=True)), M, v, n)

    def _expanded(self, terms: dict[int, float], row: int):
        """The terms with what is kept in this very row taken apart, for it lies in no slot yet."""
        for atom, coefficient in terms.items():
            if atom in self._kept and self._born[atom] == row:
                for part, share in self._expanded(self._kept[atom], row):
                    yield part, coefficient * share
            else:
                yield atom, coefficient
