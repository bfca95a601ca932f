"""The shared language: names, the recipe, the store's layout, tables and errors. Free of torch and ray."""
