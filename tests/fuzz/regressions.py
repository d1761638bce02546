"""Programs that failed once: wrong numbers, crashes, and refusals of what is supported."""

from .programs import Loss, Node, Program, W

REGRESSIONS = {
    "a view of what a layer put out for positions, changed in place": Program(
        ((2, 3, 3),),
        (Node("bilinear", 0, 0, out=1, bias=True), Node("in_place", 1, name="view")),
        Loss("mse", 2),
        batch=2,
    ),
    "finite differences of one sample whose parameter looks like a weight of its own": Program(
        ((4, 2),),
        (Node("elementwise", 0, name="x + w", shape="rows of one", w=W("new")), Node("linear", 1, out=3, bias=False)),
        Loss("smooth", 2, 1),
        batch=1,
        seed=8,
    ),
    "a penalty on parameters beside losses that are stacked": Program(
        ((2, 3, 3), (4, 2)),
        (Node("linear", 1, out=2, bias=True), Node("pooling", 0, name="upsampled")),
        Loss("loop", 3, penalty=True),
        batch=2,
        seed=7,
    ),
    "a target that is a parameter": Program(
        ((2, 3),),
        (Node("elementwise", 0, name="huber", shape="last", w=W("new")),),
        Loss("mse", 1),
        batch=1,
        seed=8,
    ),
    "finite differences of a weight whose rows are alike and as many as the samples": Program(
        ((3,),),
        (
            Node("linear", 0, out=3, bias=False),
            Node("product", 1, w=W("repeated", W("new"), how="expand"), how="F.linear", out=3),
        ),
        Loss("smooth", 2),
    ),
    "one sample changed in place by a parameter of its shape": Program(
        ((3,),),
        (Node("elementwise", 0, name="+=", shape="rows of one", w=W("new")),),
        Loss("smooth", 1),
        batch=1,
    ),
    "attention that is frozen": Program(
        ((2, 3),),
        (
            Node("linear", 0, out=3, bias=False),
            Node(
                "attention",
                1,
                heads=1,
                weights=False,
                causal=False,
                padded=False,
                bias=False,
                added=False,
                frozen="all",
            ),
        ),
        Loss("smooth", 2),
    ),
    "finite differences behind rows in another order": Program(
        ((2, 3),),
        (Node("linear", 0, out=3, bias=False), Node("merged_by_position", 1)),
        Loss("smooth", 2, 1),
    ),
    "finite differences of a bag in a sum": Program(
        (("tokens", 3),),
        (Node("embedding_bag", 0, size=3, mode="mean"), Node("looked_up", 0, size=3, how="[]")),
        Loss("smooth", 2, 1, penalty=True),
    ),
    "an output of no features": Program(
        ((3,),),
        (
            Node("product", 0, w=W("new"), how="F.linear", out=1),
            Node("product", 1, w=W("new"), how="halves of x", out=3),
        ),
        Loss("smooth", 2, 1),
    ),
    "a weight of as many rows as there are samples, all alike": Program(
        ((3,), (3,)),
        (Node("distances", 1, w=W("repeated", W("new"), how="expand"), how="cosine_similarity", out=2),),
        Loss("smooth", 2, 2),
        batch=2,
    ),
    "finite differences of a weight for each of as many positions, all alike": Program(
        (("tokens", 3),),
        (
            Node("embedding", 0, size=3, w=None, padding=None),
            Node("weight_per_position", 1, w=W("repeated", W("new"), how="expand"), out=3),
        ),
        Loss("smooth", 2),
    ),
}
