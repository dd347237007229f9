"""C&W on a plain network: ours against foolbox, torchattacks and ART; and what averaging over noise costs.

    python benchmarks/attack_speed.py --data DATA [--model cifar10-vgg16-rse] [--n 100] [--out FOLDER]

The plain network is that of the zoo with its noise switched off for good. Everybody takes the same number
of gradient steps from c = 1 at the learning rate of its own defaults, .01; ours counts both in what a
linear network would want. Ours follows the gradients of the optimised copy, in bfloat16 where that is
faster, as it does in evaluations; the others attack the plain network in float32, as their users do. A
judge measures distances and successes on the original in float32. Libraries that are not installed are
left out; ART (`--art N`, its number of images) takes most of the time, so that it gets fewer images by
default, and so do we beside it.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from timing import Case, arguments, in_turn, medians, parsed, ratio, report, settings
from torch import Tensor

import selfensemble as rse
from selfensemble import attacks
from selfensemble.evaluation import judge
from selfensemble.evaluation.adapters import art_attack, foolbox_attack, torchattacks_attack
from selfensemble.noise.injection import make_static_

Attack = Callable[[rse.SelfEnsemble, Tensor, Tensor], Tensor]


def libraries(steps: int, searches: int, images: int) -> dict[str, Attack]:
    """Attacks of those libraries that are installed."""
    same = {"steps": steps, "binary_search_steps": searches, "stepsize": 0.01, "initial_const": 1.0}
    wanted: dict[str, Callable[[], Any]] = {
        "foolbox": partial(foolbox_attack, "L2CarliniWagnerAttack", **same, abort_early=False),
        "torchattacks": partial(torchattacks_attack, "CW", steps=steps * searches, lr=0.01, c=1.0),
        "ART": partial(
            art_attack, "CarliniL2Method", max_iter=steps, binary_search_steps=searches,
            learning_rate=0.01, initial_const=1.0, batch_size=images,
        ),
    }  # fmt: skip
    found: dict[str, Attack] = {}
    for name, make in wanted.items():
        try:
            found[name] = partial(_run, make())
        except ImportError as error:
            print(f"{name} left out: {error}")
    return found


def _run(attack: Any, model: rse.SelfEnsemble, inputs: Tensor, labels: Tensor) -> Tensor:
    adversarial: Tensor = attack(model, inputs, labels, seed=0)
    return adversarial


def keeping(attack: Attack, model: rse.SelfEnsemble, x: Tensor, y: Tensor, kept: dict[str, Tensor]) -> None:
    kept["adversarial"] = attack(model, x, y)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="cifar10-vgg16-rse", help="of the zoo, or a folder")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--art", type=int, default=10, help="images for ART; 0 leaves it out")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--searches", type=int, default=5)
    parser.add_argument("--eot", type=int, default=8)
    options = parsed(parser)
    noisy = rse.load(options.model)
    plain = copy.deepcopy(noisy)
    make_static_(plain.model)
    data = rse.load_data(options.data, "test")
    inputs, labels = data.inputs(slice(options.n)), data.labels[: options.n]
    fast, fast_noisy = rse.optimize(plain, inputs), rse.optimize(noisy, inputs)
    ours = partial(
        attacks.cw_l2,
        steps=options.steps,
        binary_search_steps=options.searches,
        initial_c=1.0,
        seed=0,
    )
    others = libraries(options.steps, options.searches, options.n)
    art = others.pop("ART", None) if options.art else others.pop("ART", None) and None

    kept: dict[str, dict[str, Tensor]] = {}

    def case(name: str, attack: Attack, model: rse.SelfEnsemble, images: int) -> Case:
        kept[name] = {}
        return partial(keeping, attack, model, inputs[:images], labels[:images], kept[name])

    cases = {"ours": case("ours", ours, fast, options.n)}
    cases |= {name: case(name, attack, plain, options.n) for name, attack in others.items()}
    with_noise = partial(ours, eot=options.eot)
    averaged = f"ours, EOT {options.eot}, with noise"
    cases[averaged] = case(averaged, with_noise, fast_noisy, options.n)
    seconds = in_turn(cases, options.rounds, warm_up=1)
    ratios = {f"{name} / ours": ratio(seconds, name, "ours") for name in [*others, averaged]}
    if art is not None:
        few = f"ours, {options.art} images"
        name = f"ART, {options.art} images"
        slow = in_turn(
            {few: case(few, ours, fast, options.art), name: case(name, art, plain, options.art)},
            1,
            warm_up=0,
        )
        seconds |= slow
        ratios[f"ART / ours, {options.art} images"] = ratio(slow, name, few)

    middle = medians(seconds)
    rows = []
    values: dict[str, Any] = {}
    for name, result in kept.items():
        images = len(result["adversarial"])
        target = noisy if name == averaged else plain
        verdict = judge(target, inputs[:images], result["adversarial"], labels[:images], seed=1)
        values[name] = {
            "seconds": middle[name],
            "accuracy": verdict.accuracy,
            "mean l2": float(verdict.l2.mean()),
        }
        rows.append([name, f"{middle[name]:.2f}", f"{verdict.accuracy:.1%}", f"{verdict.l2.mean():.4f}"])
    rows += [[name, f"{value:.2f}", "", ""] for name, value in ratios.items()]
    report(
        "attack_speed",
        f"C&W, {options.n} images, {options.searches} searches of {options.steps} steps, {options.model}, "
        f"{options.threads} threads",
        ["", "seconds, or ratio", "accuracy left", "mean L2"],
        rows,
        {"settings": settings(options), "attacks": values,
         "seconds": seconds, "ratios": ratios},
        options.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
