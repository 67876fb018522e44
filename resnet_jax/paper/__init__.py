"""The paper's tables and figures, filled from runs."""

NAMES = ("table1", "table2", "table3", "table4", "table5", "table6", "figure1", "figure4", "figure6", "figure7")
