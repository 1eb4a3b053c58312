"""The views that have a tab, in the order of their numbers."""

from __future__ import annotations

from typing import NamedTuple

from memconsole.views.screens import listing
from memconsole.views.screens.handoff import Handoff
from memconsole.views.screens.hostmap import HostView
from memconsole.views.screens.overview import Overview
from memconsole.views.screens.pfnmap import PfnMap
from memconsole.views.view import View


class Named(NamedTuple):
    """A view with a tab: its name in commands and macros, its title, its class, what it counts."""

    name: str
    title: str
    cls: type[View]
    counts: str = ""


VIEWS: tuple[Named, ...] = (
    Named("overview", "Overview", Overview),
    Named("regions", "Regions", listing.Regions, "regions"),
    Named("guests", "Guests", listing.Guests, "guests"),
    Named("grants", "Grants", listing.Grants, "grants"),
    Named("pfn", "PFN", PfnMap),
    Named("mmio", "MMIO", listing.Mmio, "windows"),
    Named("iommu", "IOMMU", listing.Iommu, "domains"),
    Named("events", "Events", listing.Events),
    Named("audit", "Audit", listing.Audit, "findings"),
    Named("handoff", "Handoff", Handoff),
    Named("host", "Host", HostView),
)
