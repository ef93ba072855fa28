//! The commands `scalebox template list|delete`.

use crate::error::Error;
use crate::human::{self, bytes};
use crate::output::{Output, Table, number, text};
use crate::vm::delete_all;
use jiff::Timestamp;
use scalebox_api::{Template, TemplateList};
use scalebox_client::Client;

pub(crate) fn list(client: &Client, output: &Output) -> Result<(), Error> {
    let templates = client.templates()?;
    if output.json {
        return output.json(&TemplateList { templates });
    }
    if templates.is_empty() {
        output.hint("no templates; create one on the server with: scaleboxd template build debian-base");
        return Ok(());
    }
    let columns = vec![
        text("NAME", 0),
        number("SIZE", 1),
        number("USED", 3),
        number("EXCLUSIVE", 6),
        number("VMS", 2),
        number("AGE", 4),
        text("PROTECTED", 5),
    ];
    let now = Timestamp::now();
    let row = |template: &Template| {
        vec![
            template.name.clone(),
            bytes(template.size_bytes),
            bytes(template.used_bytes),
            human::measured(template.storage.as_ref().map(|storage| storage.exclusive_bytes)),
            template.used_by.to_string(),
            human::age(&template.created_at, now),
            if template.protected { "yes" } else { "" }.to_owned(),
        ]
    };
    output.table(Table::new(columns, templates.iter().map(row).collect()))
}

pub(crate) fn delete(client: &Client, names: &[String], yes: bool, output: &Output) -> Result<(), Error> {
    let what = if names.len() == 1 {
        "the template"
    } else {
        "the templates"
    };
    let question = format!("Delete {what} {}?", names.join(", "));
    delete_all(names, &question, yes, output, |name| client.delete_template(name))
}
