// removed when the first real file is here
