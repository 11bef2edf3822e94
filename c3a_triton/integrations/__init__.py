"""Other libraries' own ways in: each module needs its library, and is imported only where that is used."""
