"""Result files turned into what people read: ratios, tables, plots, a page, the README's results."""
