#!/usr/bin/env bash
# Checks the text in the repository: spelling (typos, https://github.com/crate-ci/typos), the width
# of comments and Markdown, and that no file is cut off.
#
# Comments and Markdown wrap at 100 columns. Exempt are lines that cannot be wrapped: tables, code
# blocks, links and diagrams. `.typos.toml` lists the words that are spelled correctly here.
set -euo pipefail
cd -- "$(dirname -- "$0")/.."

readonly typos=typos==1.52.0
venv=target/typos
if [[ $(cat "$venv/version" 2>/dev/null) != "$typos" ]]; then
	rm -rf -- "$venv"
	python3 -m venv "$venv"
	"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "$typos"
	echo "$typos" >"$venv/version"
fi
"$venv/bin/typos" --format brief

found=$(
	# shellcheck disable=SC2016 # the program is Perl
	git ls-files -z -- '*.rs' '*.md' '*.sh' '*.toml' Makefile | xargs -0 perl -CSD -ne '
		if ($. == 1) { $fence = 0; $md = $ARGV =~ /\.md$/; $marker = $ARGV =~ /\.rs$/ ? "//[/!]?" : "#" }
		my $text = $md ? $_ : m{^\s*$marker( .*|)$} ? $1 : undef;
		if (defined $text) {
			$fence = !$fence if $text =~ /^\s*```/;
			chomp(my $line = $_);
			my $exempt = $fence || $text =~ m{^\s*\||://|^ {4}|[│─┌└]};
			print "$ARGV:$.: ", length $line, " columns\n" if length $line > 100 && !$exempt;
		}
		print "$ARGV:$.: cut off: the last line has no line break\n" if eof && !/\n\z/;
		close ARGV if eof;
	'
)
if [[ -n $found ]]; then
	echo "$found" >&2
	echo "lint-text.sh: wrap these lines at 100 columns, and end files with a line break" >&2
	exit 1
fi
echo "text ok"
