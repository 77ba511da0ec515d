"""The figure of `eval.train`: loss and accuracy over the steps."""

from collections.abc import Mapping
from pathlib import Path

from eval.drawing import style


def plot(record: Mapping, path: Path) -> str:
    """Loss and accuracy over the steps of a training run, two panels, as a PNG; returns a sentence on what was done.

    `record` is the `training.json` of `eval.train`. Raises UserError where `path` cannot be written.
    """
    pyplot = style.pyplot()
    if pyplot is None:
        return style.WITHOUT
    history, steps = record["history"], [point["step"] for point in record["history"]]
    with pyplot.rc_context(style.RECIPE):
        figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 3.0), layout="constrained")
        for key, label, colour in (("text_nats", "text", "#0072B2"), ("answer_nats", "recall answers", "#D55E00")):
            axes[0].plot(steps, [point[key] for point in history], label=label, color=colour, linewidth=1.2)
        axes[0].set_ylabel("training loss, nats per token")
        axes[0].set_ylim(bottom=0)
        axes[0].legend(frameon=False)
        axes[1].plot(steps, [100 * point["answer_accuracy"] for point in history], color="#D55E00", linewidth=1.2)
        axes[1].set_ylabel("recall answers right, %")
        before = None
        for point in history:  # where the curriculum goes on to longer sequences
            if point["length"] != before:
                for axis in axes:
                    axis.axvline(point["step"], color="#000000", linewidth=0.5, alpha=0.4)
                axes[1].annotate(f" {point['length']}", (point["step"], 2), fontsize=6)
            before = point["length"]
        for axis in axes:
            axis.set_xlabel("step (lines: a new length of sequences, tokens)")
        last = record["evaluation"][-1]
        figure.suptitle(
            f"{record['non_embedding_params'] / 1e6:.2f} M parameters, {record['trained_tokens'] / 1e6:.1f} M tokens; "
            f"held out at {last['length']} tokens: {last['heldout_nats_per_token']:.2f} nats per token",
            fontsize=8,
        )
        return style.save(figure, path)
