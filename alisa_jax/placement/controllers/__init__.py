"""Controllers: one a file, each a frozen dataclass that answers a `View` with a `Plan`."""
