"""What can be read of a picture: letters that are large enough, inside it, and not on top of each other."""

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from dualrefnet.display.figure import WIDTH, ReportFigure, styled


@styled
def assert_readable(picture: ReportFigure) -> None:
    """All letters are large enough, inside the picture, and no two texts overlap; it is one column wide and has its
    words.
    """
    figure = picture.figure
    assert figure.get_figwidth() == WIDTH
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    # Labels of ticks outside a panel's limits exist but aren't drawn.
    ticks = [
        (axis, tick) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()
    ]
    outside = [
        tick.label1
        for axis, tick in ticks
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in outside]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert text.get_fontsize() >= 7, text.get_text()
        # A pixel of rounding.
        assert min(box.x0, box.y0) > -1, text.get_text()
        assert max(box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) < 1, text.get_text()
    for (one, box), (other, second) in combinations(zip(texts, boxes, strict=True), 2):
        width = min(box.x1, second.x1) - max(box.x0, second.x0)
        height = min(box.y1, second.y1) - max(box.y0, second.y0)
        assert width < 1 or height < 1, (one.get_text(), other.get_text())
    assert picture.caption.endswith(".")
    assert picture.alt
    assert picture.title
