"""Look-alikes of other projects' interfaces over our engine; each module is imported by itself."""
