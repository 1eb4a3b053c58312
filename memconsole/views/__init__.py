"""The Textual console: screens and widgets over a Source; the only importer of textual."""
