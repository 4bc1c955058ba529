"""Floating-point operations of selecting rows and of training on them, counted by a stated model.

Seconds depend on the machine and on what else it does; these depend on the model, the rows and the
method. A multiplication and an addition are two operations. Counted are matrix products:

* a forward: 2 for every weight and token; of the head's, where only losses or gradients are wanted,
  for target tokens alone, as the package's passes compute it, and not at all for hidden states;
* a backward of frozen weights: as much again; gradients of LoRA's matrices: 2 a weight and token,
  whether they are summed over rows (training) or not (features);
* a projection by `sjlt`: s updates, of 2 operations, a parameter and row;
* `fisher`: 2 m^2 M + m^3 / 3 with m the smaller and M the larger of rows and dimensions, since few
  rows are inverted by their inner products; `kfac` and `ekfac`: see `Shape.kronecker`;
* products of n stored rows with q queries in d dimensions: 2 n q d.

Not counted: products of pairs of tokens (attention; 2 to 4% of a pass here), padding, a forward
that gradient checkpointing does again, and all that is done entry by entry: Adam's features, norms,
softmax, the optimizer, sorting. Words (`bm25`) make no pass and count as nothing.

Letters: n training rows, q target rows, d dimensions, p trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

#: Dimensions of features, and updates a parameter of `sjlt`, as `world.py` has them.
DIM, UPDATES = 4096, 8
#: Rows that `kfac`, `ekfac` and a step's share are fitted to (`Batches.sample`).
SAMPLED = 256
#: Dimensions of `OutputGradients`, and its side.
OUTPUTS, SIDE = 1024, 32
#: Of `cluster_less`: rows of a cluster, gradients of one, and readings of all rows at most.
CLUSTER_ROWS, REPRESENTATIVES, READS = 64, 3, 41
#: Of `mirror`.
EPOCHS = 8
#: Of `rerank`: share of the rows, and for `cg` curvature rows and iterations at most.
RERANKED, CURVATURE_ROWS, ITERATIONS = 0.2, 64, 100
#: Checkpoints of a method `checkpoints: all`.
CHECKPOINTS = 6


@dataclass(frozen=True)
class Shape:
    """A model with LoRA on all linear layers, and the rows of a benchmark.

    Attributes:
        layers: of the model.
        hidden: width.
        keys: width of keys, and of values.
        middle: width of the MLP.
        vocabulary: tokens that the head tells apart.
        rank: of LoRA.
        rows: n.
        length: tokens of a training row, mean.
        answer: target tokens of a training row, mean.
        targets: q.
        target_length: tokens of a target row, mean.
        target_answer: target tokens of a target row, mean.
        trained_rows: rows of the steps that follow the choice, each counted as often as taken.
    """

    layers: int
    hidden: int
    keys: int
    middle: int
    vocabulary: int
    rank: int
    rows: int
    length: float
    answer: float
    targets: int
    target_length: float
    target_answer: float
    trained_rows: int

    # -- the model --------------------------------------------------------------------------------

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Outputs and inputs of a layer's seven linear layers."""
        h, k, m = self.hidden, self.keys, self.middle
        return ((h, h), (k, h), (k, h), (h, h), (m, h), (m, h), (h, m))

    @property
    def body(self) -> int:
        """Frozen weights of all layers' matrices."""
        return self.layers * sum(outer * inner for outer, inner in self.sides)

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    @property
    def lora(self) -> int:
        """Weights that are trained, p."""
        return self.layers * self.rank * sum(outer + inner for outer, inner in self.sides)

    # -- passes -----------------------------------------------------------------------------------

    def states(self, rows: float, length: float) -> float:
        """Count a forward without the head."""
        return 2 * rows * length * (self.body + self.lora)

    def forward(self, rows: float, length: float, answer: float) -> float:
        """Count a forward whose head is computed at `answer` of a row's tokens."""
        return self.states(rows, length) + 2 * rows * answer * self.head

    def gradients(self, rows: float, length: float, answer: float) -> float:
        """Count a forward, a backward of frozen weights, and gradients of LoRA's matrices."""
        passes = 2 * self.forward(rows, length, answer)
        return passes + 2 * rows * length * self.lora

    def trained(self, rows: float, length: float) -> float:
        """Count training steps on as many rows: the head is computed at every token."""
        return self.gradients(rows, length, length)

    def of_train(self, rows: float) -> float:
        """Count gradients of training rows."""
        return self.gradients(rows, self.length, self.answer)

    def of_targets(self) -> float:
        """Count gradients of the target rows."""
        return self.gradients(self.targets, self.target_length, self.target_answer)

    def projected(self, rows: float) -> float:
        """Count `sjlt` of rows."""
        return 2 * UPDATES * self.lora * rows

    # -- curvature --------------------------------------------------------------------------------

    def fisher(self) -> float:
        """Count the fit of a Fisher matrix to the stored training rows."""
        small, large = sorted((self.rows, DIM))
        return 2 * small**2 * large + small**3 / 3

    def subspace(self) -> float:
        """Count the decomposition of the target rows: their inner products."""
        return 2 * self.targets**2 * DIM

    def kronecker(self, *, corrected: bool) -> float:
        """Count fit and use of Kronecker factors: `kfac`, or `ekfac` if corrected.

        The fit: gradients of a sample, second moments of a matrix's two sides at each of its tokens
        (2 side^2), 9 side^3 for each side's eigenvectors (Golub and Van Loan, Matrix Computations,
        section 8.3), and for `ekfac` the sample's gradients once more and along the vectors. Then
        training and target rows' gradients are turned along the vectors and back: each way
        2 out in (out + in).
        """
        pairs = [pair for outer, inner in self.sides
                 for pair in ((self.rank, inner), (outer, self.rank))]  # fmt: skip
        rows, tokens = min(SAMPLED, self.rows), min(SAMPLED, self.rows) * self.length
        squares = self.layers * sum(a * a + b * b for a, b in pairs)
        cubes = self.layers * sum(a**3 + b**3 for a, b in pairs)
        turn = self.layers * sum(2 * a * b * (a + b) for a, b in pairs)
        fit = self.of_train(rows) + 2 * tokens * squares + 9 * cubes
        if corrected:
            fit += self.of_train(rows) + rows * turn
        return fit + 2 * turn * (self.rows + self.targets)


# ---- what a method does --------------------------------------------------------------------------

Count = Callable[[Shape], float]


def nothing(shape: Shape) -> float:
    """Count a choice that makes no pass: by lot, by words, by what is known."""
    return 0.0


def influence(*more: Count, apart: bool = False, checkpoints: int = 1) -> Count:
    """Count features of training and target rows, their products, and what else there is.

    Args:
        more: of each checkpoint.
        apart: whether every target row is a query of its own.
        checkpoints: whose features are taken.
    """

    def count(shape: Shape) -> float:
        rows = shape.rows + shape.targets
        features = shape.of_train(shape.rows) + shape.of_targets() + shape.projected(rows)
        products = 2 * shape.rows * DIM * (shape.targets if apart else 1)
        return checkpoints * (features + products + sum(each(shape) for each in more))

    return count


def share(shape: Shape) -> float:
    """Count what a step's share is estimated from: gradients of a sample."""
    return shape.of_train(min(SAMPLED, shape.rows))


def embedding(*, apart: bool) -> Count:
    """Count hidden states of training and target rows, and their products.

    Args:
        apart: whether every target row is a query of its own.
    """

    def count(shape: Shape) -> float:
        passes = shape.states(shape.rows, shape.length)
        passes += shape.states(shape.targets, shape.target_length)
        return passes + 2 * shape.rows * shape.hidden * (shape.targets if apart else 1)

    return count


def losses(shape: Shape) -> float:
    """Count a pass for the training rows' losses."""
    return shape.forward(shape.rows, shape.length, shape.answer)


def mirror(shape: Shape) -> float:
    """Count losses before and after, and the epochs on the target between them."""
    training = shape.gradients(shape.targets, shape.target_length, shape.target_answer)
    return 2 * losses(shape) + EPOCHS * training


def landmarks(count: int) -> Count:
    """Count some rows' influence, and what estimates all others' from it.

    The gradient at the output layer takes the head once more, backwards, and two projections of the
    hidden width a target token; the regression 2 n m outputs and m^3 / 3 for m landmarks.
    """

    def counted(shape: Shape) -> float:
        some = shape.of_train(count) + shape.of_targets() + shape.projected(count + shape.targets)
        token = 2 * shape.head + 4 * shape.hidden * SIDE + 2 * SIDE**2
        outputs = losses(shape) + shape.rows * shape.answer * token
        fit = 2 * (shape.rows + count) * count * OUTPUTS + count**3 / 3
        return some + 2 * count * DIM + outputs + fit

    return counted


def clustered(shape: Shape) -> float:
    """Count hidden states, k-means of them at its limit, and the representatives' influence."""
    clusters = math.ceil(shape.rows / CLUSTER_ROWS)
    some = REPRESENTATIVES * clusters
    states = shape.states(shape.rows, shape.length)
    compared = 2 * shape.rows * clusters * shape.hidden
    gradients = shape.of_train(some) + shape.of_targets() + shape.projected(some + shape.targets)
    return states + READS * compared + gradients + 2 * some * DIM


def exact(shape: Shape) -> float:
    """Count a second ranking by whole gradients: the candidates', and the target's once more."""
    candidates = RERANKED * shape.rows
    return shape.of_targets() + shape.of_train(candidates) + 2 * candidates * shape.lora


def conjugate(shape: Shape) -> float:
    """Count a second ranking by `cg`, its iterations at their limit: an upper bound.

    A product with the Gauss-Newton matrix is a forward, one along a direction (the frozen weights'
    part, and both of each LoRA matrix), and a backward with gradients of the LoRA matrices.
    """
    rows, tokens = CURVATURE_ROWS, CURVATURE_ROWS * shape.length
    along = shape.forward(rows, shape.length, shape.answer) + 2 * tokens * shape.lora
    product = shape.of_train(rows) + along
    return exact(shape) + ITERATIONS * product


def kfac(shape: Shape) -> float:
    """Count `preconditioner: kfac`."""
    return shape.kronecker(corrected=False)


def ekfac(shape: Shape) -> float:
    """Count `preconditioner: ekfac`."""
    return shape.kronecker(corrected=True)


#: A method of rules.py or real.py -> its count; None: not counted, since another package's program
#: makes its passes.
SELECTING: dict[str, Count | None] = {
    "oracle": nothing,
    "random": nothing,
    "bm25": nothing,
    "bm25, round_robin": nothing,
    "near (hidden states)": embedding(apart=True),
    "near (hidden states), top": embedding(apart=False),
    "rds_plus": embedding(apart=True),
    "rds_plus, top": embedding(apart=False),
    "loss": losses,
    "tsds": embedding(apart=True),
    "icons, a task a row": influence(apart=True),
    "cluster_less": clustered,
    "less": influence(),
    "less, published adam": influence(),
    "less, sgd": influence(),
    "less, share of a step": influence(share),
    "less, normalize: target": influence(),
    "less, subspace": influence(Shape.subspace),
    "less, round_robin": influence(apart=True),
    "less, rerank": influence(exact),
    "less, rerank by cg": influence(conjugate),
    "landmarks, 100": landmarks(100),
    "landmarks, 250": landmarks(250),
    "mirror": mirror,
    "mirror, relative: false": mirror,
    "less, sgd, fisher": influence(Shape.fisher),
    "less, sgd, fisher, round_robin": influence(Shape.fisher, apart=True),
    "less, sgd, kfac": influence(kfac),
    "less, sgd, ekfac": influence(ekfac),
    "less, checkpoints: all": influence(checkpoints=CHECKPOINTS),
    "less, sgd, fisher, checkpoints: all": influence(Shape.fisher, checkpoints=CHECKPOINTS),
    "less, sgd, fisher, round_robin, checkpoints: all": influence(
        Shape.fisher, apart=True, checkpoints=CHECKPOINTS
    ),
    "bergson trackstar": None,
    "bergson trak": None,
    "bergson ekfac": None,
}


def selecting(method: str, shape: Shape) -> float | None:
    """Count what choosing rows for one target takes; None for a method that is not counted."""
    count = SELECTING[method]
    return None if count is None else count(shape)


def training(shape: Shape) -> float:
    """Count the steps on the chosen rows, taken to be as long as training rows are in mean."""
    return shape.trained(shape.trained_rows, shape.length)


# ---- the two benchmarks --------------------------------------------------------------------------

#: Of `rules.py` and `real.py`, steps on the chosen rows, and rows of a step.
TAKEN_STEPS, REAL_STEPS, STEP_ROWS = 30, 16, 8

#: The embedded model, and the rows of `rules_data.py`: means over seeds 1 to 8.
RULES = Shape(
    layers=4, hidden=160, keys=160, middle=448, vocabulary=512, rank=16,
    rows=1000, length=34.76, answer=12.99, targets=32, target_length=34.84, target_answer=13.02,
    trained_rows=TAKEN_STEPS * STEP_ROWS,
)  # fmt: skip

#: SmolLM2-135M, and the rows of `real_rows.py`: means over seeds 1 to 3 and the three targets.
REAL = Shape(
    layers=30, hidden=576, keys=192, middle=1536, vocabulary=49_152, rank=16,
    rows=520, length=120.5, answer=33.13, targets=16, target_length=147.6, target_answer=33.88,
    trained_rows=REAL_STEPS * STEP_ROWS,
)  # fmt: skip
