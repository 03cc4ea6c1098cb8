"""Draw accuracy against time. Needs matplotlib."""

import math

import numpy as np


def figure(tasks, arms, path):
    """Draw accuracy against time: a panel for each of the first 8 Tasks, a line for each method of the headline.

    arms: {(keep, method): {Task: arm}}. A Task with one point has no panel, unless none has more. A method's line
    goes through its keep fractions. The equal-time curve of full data is black. Writes path.svg and path.png.
    ImportError without matplotlib.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    full = [task for task in tasks if task.full]
    tasks = [task for task in full if sum(task in by_task for by_task in arms.values()) > 1][:8] or full[:1]
    methods = sorted({name for (_, name), by_task in arms.items() if not any(arm.full for arm in by_task.values())})
    styles = {name: (f"C{i}", "osD^vPX*<>"[i % 10]) for i, name in enumerate(methods)}
    columns = min(3, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    with rc_context({"svg.hashsalt": "data diets", "text.parse_math": False, "axes.spines.top": False,
                     "axes.spines.right": False}):  # fmt: skip
        fig = Figure(figsize=(3.2 * columns, 2.5 * lines + 0.7), layout="constrained")
        axes = fig.subplots(lines, columns, squeeze=False).flat
        for ax in axes[len(tasks) :]:
            ax.remove()
        for ax, task in zip(axes, tasks):
            panel(ax, task, {key: by_task[task] for key, by_task in arms.items() if task in by_task}, styles)
        handles = {label: handle for ax in fig.axes for handle, label in zip(*ax.get_legend_handles_labels())}
        fig.supxlabel("time, % of full data (numbers: keep; bars: 1 SD; hollow: under 3 seeds)", size=9)
        fig.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns + 2, frameon=False)
        fig.savefig(path.with_suffix(".svg"), metadata={"Date": None})  # the same file for the same content
        fig.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})


def panel(ax, task, arms, styles):
    """Draw one Task. A point far below full data sits at the lower edge, beside its value."""
    curve = [(task.percent(cost), accuracy) for cost, accuracy, _ in task.corners]
    full = [arm.mean for arm in task.baselines]
    ax.plot(*zip(*curve), color="black", lw=1.5, label="full data, upper envelope")
    for arm in task.baselines:
        fill = "white" if len(arm.rows) < 3 else "black"
        ax.plot(task.percent(arm.cost), arm.mean, color="black", marker="o", ms=3, mfc=fill, zorder=3)
    edge = min(full) - 1.5 * max(1.0, max(full) - min(full))
    places = [(4, 3), (4, -9), (-4, 3), (-4, -9)]  # where a point's keep fraction stands, by method
    for i, (name, (color, marker)) in enumerate(styles.items()):
        points = sorted((task.percent(arm.cost), arm.mean, arm.deviation, len(arm.rows), keep)
                        for (keep, method), arm in arms.items() if method == name)  # fmt: skip
        if not points:
            continue
        times, means, spreads, seeds, keeps = map(np.array, zip(*points))
        heights, few = np.maximum(means, edge), seeds < 3
        ax.plot(times, heights, color=color, marker=marker, ms=4.5, lw=1.2, zorder=3, label=name)
        ax.plot(times[few], heights[few], color=color, marker=marker, ms=4.5, mfc="white", ls="", zorder=4)
        ax.errorbar(times, means, yerr=spreads, color=color, ls="", elinewidth=0.7, alpha=0.6)
        for time, height, accuracy, keep in zip(times, heights, means, keeps):
            text, (x, y) = (keep, places[i % 4]) if accuracy >= edge else (f"{keep}: {accuracy:.1f}", places[0])
            ax.annotate(text, (time, height), xytext=(x, y), textcoords="offset points", size=7, color=color,
                        ha="left" if x > 0 else "right")  # fmt: skip
    ax.set(title=task.title, ylabel=f"{task.measure}, %")
    ax.set_ylim(bottom=max(edge - 0.03 * (max(full) - edge), ax.get_ylim()[0]))
