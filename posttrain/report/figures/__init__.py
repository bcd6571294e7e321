"""Charts of a page: matplotlib draws them, as SVG inside the page, in the page's own colours."""
