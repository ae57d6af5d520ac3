"""Plotly figures of what the other packages measure, for notebooks, the report and the live page.

Memory is always blue and context always vermillion, in bars, dots and heat maps alike. Whatever shows a mean shows its
95 % interval, and the hover text adds unit and n. Text, grid and background colours come from a theme alone, so that a
figure changes from light to dark with ``figure.update_layout(template=DARK_THEME)``.
"""
