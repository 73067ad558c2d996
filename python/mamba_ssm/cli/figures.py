"""Pictures as PNG and SVG, where matplotlib is installed."""

NO_MATPLOTLIB = (
    'matplotlib is not installed, so there is no picture; pip install "mamba_ssm[cli]" brings it'
)


def new_figure():
    """A matplotlib figure with axes, as (figure, axes), or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.add_subplot()


def save(figure, folder, name):
    """Writes <name>.png and <name>.svg into the folder."""
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"{name}.{suffix}", dpi=150)
