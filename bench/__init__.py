import hybrid  # noqa: F401 (before torch: it keeps torch's idle threads from spinning into what is timed)
