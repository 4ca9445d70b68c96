"""graph_diff: two graphs, node by node, as text, HTML and SVG."""
