"""One model, one cluster, every system that would train it: step time and bytes on the links, side by side."""
