"""Bar charts that are drawn here: which bar is the tallest, and how many there are."""

from functools import partial
from random import Random

from PIL import Image, ImageDraw

from data_pipeline.author import Task, all_labels, generated

COLORS = ("red", "orange", "green", "blue", "purple", "black")


def charts(data):
    for n in range(2000):
        random = Random(n)
        colors, heights = random.sample(COLORS, random.randint(3, 6)), random.sample(range(10, 115, 15), 6)
        bars = dict(zip(colors, heights, strict=False))
        picture = Image.new("RGB", (128, 128), tuple(random.choices(range(190, 256), k=3)))
        for x, (color, height) in enumerate(bars.items()):
            ImageDraw.Draw(picture).rectangle((5 + 20 * x, 123 - height, 19 + 20 * x, 123), color)
        yield dict(picture=picture, tallest=max(bars, key=lambda color: bars[color]), count=len(bars))


chart = partial(Task, source=generated(charts), licence="CC0-1.0", citation="this file", author="vflax")
ask = ["Which color has the tallest bar of the chart?", "Name the color of the highest bar."]
tallest = chart(name="BARS+tallest", instructions=ask, output="{tallest}", options=all_labels(letters=False))
ask = ["How many bars are in the chart?", "Count the bars of this chart."]
count = chart(name="BARS+count", instructions=ask, output="{count}")
