"""JoinedProducts: products of a compiled layer that share an input, or whose results are only added, made as one.

A pass over the graphs that the compiler is about to turn into kernels (inductor's `post_grad_custom_pre_pass`), forward
and backward apart. It knows operators and no names of modules, so that any family and any adapter may profit:
- frozen projections of one input (queries, keys, values) become one product, their adapters' A matrices another;
- what frozen projections send back to one input is a sum of products, `g1 @ W1 + g2 @ W2 + …`: one product of the
  gradients side by side and the weights one below another, whose parts are never written; adapters' likewise;
- gradients of A matrices over one input become one product;
- an adapter's scale moves from its wide gradient to the narrow products made of it.
A sum made inside a product is rounded once, from fp32, where it was rounded part by part.
A graph that the pass cannot cope with is compiled as it was.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial
from operator import is_not
from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from lorafit.backbone import frozen_product, frozen_products

MM = torch.ops.aten.mm.default
ADD = torch.ops.aten.add.Tensor
MUL = torch.ops.aten.mul.Tensor
CAT = torch.ops.aten.cat.default
SLICE = torch.ops.aten.slice.Tensor
PERMUTE = torch.ops.aten.permute.default
CONVERT = torch.ops.prims.convert_element_type.default
RESHAPE = torch.ops.aten.reshape.default
RESHAPES = (RESHAPE, torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)

LOG = logging.getLogger("torch.lorafit")
"""Beside the compiler's own, which go to a run's log."""

NARROW = 256
"""Columns up to which a product is an adapter's: its time goes into reading its input, so that sharing one pays."""

ALIGNED = 8
"""Rows in 16 bits begin at multiples of 16 bytes, as fast kernels want it, where they have a multiple of this."""


class JoinedProducts(CustomGraphPass):
    """The pass; see the module."""

    def __call__(self, graph: Graph) -> None:
        try:
            join_products(copy.deepcopy(graph))
        except Exception:  # a backward graph is compiled while the pass runs that needs it: too late to do without
            LOG.warning("products of a layer are not joined", exc_info=True)
            return
        join_products(graph)

    def uuid(self) -> Any:
        """What the compiler's cache knows this pass by."""
        backbone = Path(__file__).parent.parent / "backbone"
        operators = [str(backbone / name) for name in ("frozen_linear_op.py", "frozen_products.py")]
        return get_hash_for_files((__file__, *operators))  # cached code calls those as they are declared


JOINED_PRODUCTS = JoinedProducts()


def join_products(graph: Graph) -> None:
    """Change `graph` as the module says."""
    from torch._inductor.pattern_matcher import stable_topological_sort  # brings all of inductor along

    edit = _Edit(graph)
    for change in (_move_scales, _join_frozen, _join_narrow, _join_sums):
        graph.eliminate_dead_code()  # else what nobody wants any more counts as a use
        change(edit)
        stable_topological_sort(graph)
    graph.eliminate_dead_code()


class _Edit:
    """A graph being changed: nodes are added before one that wants them, and put in order by the caller."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._made: dict[Hashable, Node] = {}

    def nodes(self, target: Any) -> list[Node]:
        """The calls of `target`, in order."""
        return sorted(self.graph.find_nodes(op="call_function", target=target), key=self.place)

    def place(self, node: Node) -> int:
        """Where it stood before anything was changed; what was added comes last."""
        return self._order.get(node, len(self._order))

    def call(self, target: Any, *arguments: Any, at: Node) -> Node:
        """A call of `target` before `at`; the same one for the same arguments."""
        key = (target, _hashable(arguments))
        if key not in self._made:
            self._made[key] = self.new(target, *arguments, at=at)
        return self._made[key]

    def new(self, target: Any, *arguments: Any, at: Node) -> Node:
        """A call of its own of `target` before `at`."""
        with self.graph.inserting_before(at):
            node = self.graph.call_function(target, arguments)
        # its shape, which lowering and later passes ask for
        node.meta["val"] = target(*torch.fx.map_arg(arguments, lambda given: given.meta["val"]))
        return node

    def cat(self, nodes: Sequence[Node], axis: int, at: Node) -> Node:
        """`nodes` one after another along `axis`."""
        return self.call(CAT, list(nodes), axis, at=at)

    def parts(self, joined: Node, like: Sequence[Node], axis: int, at: Node) -> list[Node]:
        """Slices of `joined` along `axis`, which are as wide as `like` and hold in their order what those do."""
        found, begin = [], 0
        for part in like:
            end = begin + _size(part, axis)
            found.append(self.call(SLICE, joined, axis, begin, end, at=at))
            begin = end
        return found

    def split(self, joined: Node, parts: Sequence[Node], axis: int, at: Node) -> None:
        """Put slices of `joined` in the place of `parts`, wherever those are used but in `joined` itself."""
        for part, place in zip(parts, self.parts(joined, parts, axis, at), strict=True):
            part.replace_all_uses_with(place, delete_user_cb=lambda user: user is not joined)


def _move_scales(edit: _Edit) -> None:
    """`(x · s) @ b` becomes `(x @ b) · s` where that is narrower: x need not be written a second time, scaled."""
    for scaled in edit.nodes(MUL):
        source, scale = scaled.args
        if not isinstance(source, Node) or not isinstance(scale, (int, float)):
            continue
        products = _products_of(scaled)
        if not products or _dtype(source) is not _dtype(scaled):
            continue
        if len(set(products)) < len(products):
            continue  # one reads it by both operands
        if _dtype(source) is torch.float16 and abs(scale) < 1:
            continue  # a product of what is not scaled down yet may be too large for it
        if not all(_is_narrower(product, scaled) for product in products):
            continue
        scaled.replace_all_uses_with(source)
        for product in products:
            moved = edit.new(MUL, product, scale, at=product)
            product.replace_all_uses_with(moved, delete_user_cb=partial(is_not, moved))


def _is_narrower(product: Node, than: Node) -> bool:
    """Whether a side of `product` is shorter than the rows of `than`, which share the other side with it; told without
    asking how many tokens there are."""
    sides = [size for size in product.meta["val"].shape if isinstance(size, int)]
    row = _size(than, -1)
    return bool(sides) and isinstance(row, int) and min(sides) < row


def _products_of(node: Node) -> list[Node]:
    """The matmuls that use `node`, through views of it; none where anything else does too."""
    found: list[Node] = []
    for user in node.users:
        if user.target in (*RESHAPES, PERMUTE):
            below = _products_of(user)
        else:
            below = [user] if user.target is MM and user.args[0] is not user.args[1] else []
        if not below:
            return []
        found += below
    return found


def _join_frozen(edit: _Edit) -> None:
    """Frozen projections of one input. Those that make more columns than they take fill a card on their own."""
    groups = defaultdict(list)
    for node in edit.nodes(frozen_product):
        x, _, out_features, in_features, transposed = node.args
        known = isinstance(out_features, int) and isinstance(in_features, int)
        if not transposed and known and out_features <= in_features and not _is_result(node):  # type: ignore[operator]
            groups[x, in_features].append(node)
    for (x, in_features), nodes in groups.items():
        if len(nodes) > 1:
            nodes = _as_weights_lie(edit, nodes)
            handles, widths = [_given(node, 1) for node in nodes], [_given(node, 2) for node in nodes]
            joined = edit.call(frozen_products, x, handles, widths, in_features, False, at=nodes[0])
            edit.split(joined, nodes, -1, nodes[0])


def _as_weights_lie(edit: _Edit, nodes: list[Node]) -> list[Node]:
    """In the order of the layer's inputs: that of its projections, in which copies lie that are kept."""
    return sorted(nodes, key=lambda node: edit.place(_given(node, 1)))


def _is_result(node: Node) -> bool:
    """Whether `node`, or a view of it, is kept for the backward, where a slice of something larger is no good."""
    views = (*RESHAPES, PERMUTE)
    return any(user.op == "output" or (user.target in views and _is_result(user)) for user in node.users)


def _join_narrow(edit: _Edit) -> None:
    """Narrow matmuls that share an operand: `x @ Aᵀ` for several A, and their gradients `dhᵀ @ x`."""
    for shared, other in ((0, 1), (1, 0)):
        groups = defaultdict(list)
        for node in edit.nodes(MM):
            if _given(node, other).target is PERMUTE and _is_narrow(_size(node, other)):
                groups[node.args[shared]].append(node)
        for whole, nodes in groups.items():
            if len(nodes) > 1 and sum(_size(node, other) for node in nodes) <= NARROW:
                _join_matmuls(edit, whole, nodes, shared)


def _join_matmuls(edit: _Edit, whole: Any, nodes: list[Node], shared: int) -> None:
    """One matmul with the node `whole`, which is operand `shared` of all of `nodes`."""
    other, at = 1 - shared, nodes[0]
    sources = [_given(_given(node, other), 0) for node in nodes]  # of the permuted operands
    before = _ancestors(sources)
    if len(set(sources)) < len(sources) or any(user in before for source in sources for user in source.users):
        return  # one is made of another, and cannot wait for it
    side_by_side = edit.cat(sources, shared, at)
    narrow = edit.call(PERMUTE, side_by_side, [1, 0], at=at)
    operands = (whole, narrow) if shared == 0 else (narrow, whole)
    edit.split(edit.call(MM, *operands, at=at), nodes, other, at)
    if shared == 0 and all(source.op == "call_function" for source in sources):
        # weights, cast for this: whatever else wants them takes them from here, and they are cast once
        edit.split(side_by_side, sources, 0, at)


def _join_sums(edit: _Edit) -> None:
    """Sums of products: frozen projections' and adapters' gradients to one input."""
    for root in edit.nodes(ADD):
        if not _is_sum(root) or any(_is_sum(user) for user in root.users):
            continue
        terms = _terms(root)
        frozen = [term for term in terms if _sends_back(term)]
        found = [(_join_back, frozen), *((_join_low, part) for part in _narrow_alike(terms))]
        joins = [(join, part) for join, part in found if len(part) > 1]
        if joins:
            gone = {term for _, part in joins for term in part}
            total, *rest = [join(edit, part, root) for join, part in joins] + [t for t in terms if t not in gone]
            for term in rest:
                total = edit.call(ADD, total, term, at=root)
            root.replace_all_uses_with(total)


def _is_sum(node: Node) -> bool:
    """Whether it adds tensors of its own kind, with nothing to multiply or to spread out."""
    return node.target is ADD and not node.kwargs and all(_alike(term, node) for term in node.args)


def _alike(term: Any, node: Node) -> bool:
    here, there = term.meta.get("val") if isinstance(term, Node) else None, node.meta["val"]
    return isinstance(here, torch.Tensor) and here.dtype is there.dtype and here.shape == there.shape


def _terms(root: Node) -> list[Node]:
    """What `root` adds up, sums that nothing else uses taken apart."""
    found: list[Node] = []
    for place in range(2):
        term = _given(root, place)
        found += _terms(term) if _is_sum(term) and len(term.users) == 1 else [term]
    return found


def _sends_back(term: Node) -> bool:
    """Whether it is a frozen projection's gradient to its input, and nothing but a part of a sum."""
    if term.target is not frozen_product or len(term.users) != 1:
        return False
    _, _, out_features, _, transposed = term.args
    return transposed is True and isinstance(out_features, int) and out_features % ALIGNED == 0


def _join_back(edit: _Edit, terms: list[Node], at: Node) -> Node:
    """`g1 @ W1 + g2 @ W2 + …` as one product."""
    terms = _as_weights_lie(edit, terms)
    gradients = [_given(term, 0) for term in terms]
    joined = edit.cat(gradients, -1, at)
    _read_from(edit, joined, gradients, at)
    handles, widths = [_given(term, 1) for term in terms], [_given(term, 2) for term in terms]
    return edit.call(frozen_products, joined, handles, widths, terms[0].args[3], True, at=at)


def _read_from(edit: _Edit, joined: Node, gradients: Sequence[Node], at: Node) -> None:
    """Have the adapters' products read `gradients` from `joined` too, so that each is written there alone."""
    before = _ancestors(gradients)  # what one of them is made of cannot wait for all of them

    def reads(user: Node) -> bool:
        return user.target in RESHAPES and user not in before and bool(_products_of(user))

    for gradient, place in zip(gradients, edit.parts(joined, gradients, -1, at), strict=True):
        gradient.replace_all_uses_with(place, delete_user_cb=reads)


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _narrow_product(term: Node) -> Node | None:
    """The adapter's matmul, over few columns, that `term` is a view of, used nowhere else; None for another term."""
    node = term
    while len(node.users) == 1 and node.target in (*RESHAPES, CONVERT) and _dtype(node) is _dtype(term):
        node = _given(node, 0)
    if node.target is not MM or len(node.users) != 1 or _dtype(node) is not _dtype(term):
        return None
    return node if _is_narrow(_size(_given(node, 0), 1)) else None


def _narrow_alike(terms: Sequence[Node]) -> list[list[Node]]:
    """Those that are adapters' products, by the shape of the product: only equal ones can be made together."""
    groups = defaultdict(list)
    for term in terms:
        product = _narrow_product(term)
        if product is not None:
            groups[str(product.meta["val"].shape)].append(term)
    return list(groups.values())


def _join_low(edit: _Edit, terms: list[Node], at: Node) -> Node:
    """`h1 @ A1 + h2 @ A2 + …` as one product, in the shape of the sum."""
    products = [product for product in map(_narrow_product, terms) if product is not None]
    products.sort(key=edit.place)
    left = edit.cat([_given(product, 0) for product in products], 1, at)
    right = edit.cat([_given(product, 1) for product in products], 0, at)
    joined = edit.call(MM, left, right, at=at)
    view = terms[0]
    while view.target is CONVERT:
        view = _given(view, 0)
    return edit.call(RESHAPE, joined, view.args[1], at=at) if view.target in RESHAPES else joined


def _given(node: Node, place: int) -> Any:
    return node.args[place]


def _is_narrow(width: Any) -> bool:
    return isinstance(width, int) and width <= NARROW


def _size(node: Node, axis: int) -> Any:
    return node.meta["val"].shape[axis]


def _dtype(node: Node) -> torch.dtype:
    found: torch.dtype = node.meta["val"].dtype
    return found


def _hashable(value: Any) -> Hashable:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value
