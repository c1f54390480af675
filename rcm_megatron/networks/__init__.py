"""Networks of a run by role: built on the ranks of a layout, filled with weights, spread over ranks; nothing here trains them."""
