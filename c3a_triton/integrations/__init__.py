"""What ties this library to others: one module each, imported only when it is asked for."""
