"""A map in the console: once it is read, and what a person sees of its cells."""

from __future__ import annotations

from textual.pilot import Pilot

from memconsole.views.app import ConsoleApp
from memconsole.views.screens.mapview import MapView
from memconsole.views.widgets.heatmap import HeatMap


async def arrived(pilot: Pilot[None]) -> MapView:
    """The map in front, once nothing is read for it any more."""
    assert isinstance(pilot.app, ConsoleApp)
    await pilot.pause()
    view = pilot.app.view
    assert isinstance(view, MapView)
    while view.scanning or any(worker.node is view and worker.is_running for worker in pilot.app.workers):
        await pilot.pause(0.01)
    await pilot.pause()
    assert view.model is not None, view.error
    return view


def cells(view: MapView) -> str:
    """The cells, row after row, without the addresses beside them; blank where there is none."""
    heat = view.query_one(HeatMap)
    return "".join(heat.render_line(y).text[15:-1] for y in range(heat.size.height))
